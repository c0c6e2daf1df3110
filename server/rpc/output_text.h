// From the tokens of an output to the text that is shown of it.
#ifndef MMFREE_SERVER_RPC_OUTPUT_TEXT_H_
#define MMFREE_SERVER_RPC_OUTPUT_TEXT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/sampling/stop_strings.h"
#include "server/scheduler/request.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

// Decodes tokens and ends the text at a stop string, holding back what may be the beginning of one
// until that is decided. Not thread-safe; a copy goes on by itself.
class OutputText {
 public:
  struct Options {
    std::shared_ptr<const StopStrings> stop_strings;  // null: none
    bool include_stop = false;                        // show the one that ended the text
    int64_t min_tokens = 0;  // strings that are complete before so many tokens do not end it
  };

  // `starts_text`: as StreamDecoder. The tokenizer must outlive it.
  OutputText(const Tokenizer* tokenizer, bool starts_text, Options options);

  // What can be shown now that this token is known; nothing once a stop string matched.
  std::string Append(int32_t token);

  // The end of the output, when no stop string matched: what was held back. Bytes of an unfinished
  // character become U+FFFD.
  std::string Finish();

  // The stop string that ended the text; null while none has.
  const std::string* matched() const { return matched_; }

 private:
  const Options options_;
  StreamDecoder decoder_;
  int64_t tokens_ = 0;
  StopStrings::Node node_ = StopStrings::kStart;
  std::string held_back_;
  const std::string* matched_ = nullptr;  // in options_.stop_strings
};

// Tells the scheduler where OutputText ends the text, so that nothing is computed beyond it.
class TextStop final : public StopCondition {
 public:
  explicit TextStop(OutputText text) : text_(std::move(text)) {}

  bool Append(int32_t token) override {
    text_.Append(token);
    return text_.matched() != nullptr;
  }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<TextStop>(*this);
  }

 private:
  OutputText text_;
};

// Whether what follows `prompt` is the start of all text: the prompt has none (BOS alone).
bool StartsText(const Tokenizer& tokenizer, absl::Span<const int32_t> prompt);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_OUTPUT_TEXT_H_
