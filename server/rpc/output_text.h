// From the tokens of an output to the text that is shown of it.
#ifndef MMFREE_SERVER_RPC_OUTPUT_TEXT_H_
#define MMFREE_SERVER_RPC_OUTPUT_TEXT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
  // character become U+FFFD, with which one may match after all. Nothing when it is called again.
  std::string Finish();

  // The stop string that ended the text; null while none has.
  const std::string* matched() const { return matched_; }

  // How many of the first tokens end within what was shown, and at the end of a character: they
  // stay whatever comes. 0 without stop strings.
  int64_t settled_tokens() const { return boundaries_.front().tokens; }

  // The whole text as tokens: so many of the first ones, and then `rest`, the shown part of those
  // that the cut goes through.
  struct Kept {
    int64_t tokens = 0;
    std::string rest;
    bool drops_leading_space = false;  // as StreamDecoder does at this place
  };
  // Once a stop string has matched.
  Kept kept() const;

 private:
  // A place between two tokens and between two characters.
  struct Boundary {
    int64_t tokens = 0;
    size_t text = 0;  // bytes of tail_ before it
    bool drops_leading_space = false;
  };

  // Appends to tail_ as much of `text` as there is before a stop string is complete; whether one
  // is.
  bool EndsIn(absl::string_view text);
  // The next part of tail_, up to `end`.
  std::string Show(size_t end);
  // Notes the place after the last token, if it is one, and forgets what is settled.
  void Settle();
  void AddBoundary();

  const Options options_;
  StreamDecoder decoder_;
  int64_t tokens_ = 0;
  StopStrings::Node node_ = StopStrings::kStart;
  std::string tail_;                      // the text since the settled boundary
  size_t shown_ = 0;                      // bytes of it that were shown; the rest is held back
  std::vector<Boundary> boundaries_;      // the settled one, and those after it
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
  bool Finish() override {
    text_.Finish();
    return text_.matched() != nullptr;
  }
  int64_t settled() const override { return text_.settled_tokens(); }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<TextStop>(*this);
  }

  // Once the request has ended.
  const OutputText& text() const { return text_; }

 private:
  OutputText text_;
};

// Whether what follows `prompt` is the start of all text: the prompt has none (BOS alone).
bool StartsText(const Tokenizer& tokenizer, absl::Span<const int32_t> prompt);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_OUTPUT_TEXT_H_
