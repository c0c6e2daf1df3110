#include "server/rpc/output_text.h"

#include <algorithm>
#include <utility>

namespace mmfree {

OutputText::OutputText(const Tokenizer* tokenizer, bool starts_text, Options options)
    : options_(std::move(options)), decoder_(tokenizer, starts_text) {}

std::string OutputText::Append(int32_t token) {
  if (matched_ != nullptr) return "";
  std::string text = decoder_.Append(token);
  ++tokens_;
  if (options_.stop_strings == nullptr) return text;

  const StopStrings& strings = *options_.stop_strings;
  for (size_t i = 0; i < text.size(); ++i) {
    node_ = strings.Next(node_, text[i]);
    const int32_t match = strings.match(node_);
    if (match < 0 || tokens_ < options_.min_tokens) continue;
    matched_ = &strings.string(match);
    held_back_.append(text, 0, i + 1);
    if (!options_.include_stop) held_back_.resize(held_back_.size() - matched_->size());
    return std::exchange(held_back_, "");
  }
  held_back_ += text;
  // Whole characters: the strings are valid UTF-8, and so is what they may begin in.
  const size_t shown = held_back_.size() - strings.pending(node_);
  text = held_back_.substr(0, shown);
  held_back_.erase(0, shown);
  return text;
}

std::string OutputText::Finish() {
  if (matched_ != nullptr) return "";
  return std::exchange(held_back_, "") + decoder_.Finish();
}

bool StartsText(const Tokenizer& tokenizer, absl::Span<const int32_t> prompt) {
  return std::all_of(prompt.begin(), prompt.end(),
                     [&tokenizer](int32_t id) { return tokenizer.TokenBytes(id).empty(); });
}

}  // namespace mmfree
