#include "server/rpc/output_text.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {

OutputText::OutputText(const Tokenizer* tokenizer, bool starts_text, Options options)
    : options_(std::move(options)), decoder_(tokenizer, starts_text) {
  AddBoundary();
}

std::string OutputText::Append(int32_t token) {
  if (matched_ != nullptr) return "";
  std::string text = decoder_.Append(token);
  ++tokens_;
  if (options_.stop_strings == nullptr) return text;

  if (EndsIn(text)) return Show(tail_.size());
  // Whole characters: the strings are valid UTF-8, and so is what they may begin in.
  text = Show(tail_.size() - options_.stop_strings->pending(node_));
  Settle();
  return text;
}

std::string OutputText::Finish() {
  if (matched_ != nullptr) return "";
  const std::string text = decoder_.Finish();
  if (options_.stop_strings == nullptr) return text;
  (void)EndsIn(text);
  return Show(tail_.size());
}

bool OutputText::EndsIn(absl::string_view text) {
  const StopStrings& strings = *options_.stop_strings;
  for (size_t i = 0; i < text.size(); ++i) {
    node_ = strings.Next(node_, text[i]);
    const int32_t match = strings.match(node_);
    if (match < 0 || tokens_ < options_.min_tokens) continue;
    matched_ = &strings.string(match);
    absl::StrAppend(&tail_, text.substr(0, i + 1));
    if (i + 1 == text.size()) AddBoundary();
    if (!options_.include_stop) tail_.resize(tail_.size() - matched_->size());
    return true;
  }
  absl::StrAppend(&tail_, text);
  return false;
}

OutputText::Kept OutputText::kept() const {
  const auto after =
      std::find_if(boundaries_.begin() + 1, boundaries_.end(),
                   [this](const Boundary& boundary) { return boundary.text > tail_.size(); });
  const Boundary& last = *std::prev(after);
  return {last.tokens, tail_.substr(last.text), last.drops_leading_space};
}

std::string OutputText::Show(size_t end) {
  std::string text = tail_.substr(shown_, end - shown_);
  shown_ = end;
  return text;
}

void OutputText::Settle() {
  AddBoundary();
  const auto open =
      std::find_if(boundaries_.begin() + 1, boundaries_.end(),
                   [this](const Boundary& boundary) { return boundary.text > shown_; });
  boundaries_.erase(boundaries_.begin(), std::prev(open));
  const size_t settled = boundaries_.front().text;
  tail_.erase(0, settled);
  shown_ -= settled;
  for (Boundary& boundary : boundaries_) boundary.text -= settled;
}

void OutputText::AddBoundary() {
  if (decoder_.unfinished()) return;
  boundaries_.push_back({tokens_, tail_.size(), decoder_.drops_leading_space()});
}

bool StartsText(const Tokenizer& tokenizer, absl::Span<const int32_t> prompt) {
  return std::all_of(prompt.begin(), prompt.end(),
                     [&tokenizer](int32_t id) { return tokenizer.TokenBytes(id).empty(); });
}

}  // namespace mmfree
