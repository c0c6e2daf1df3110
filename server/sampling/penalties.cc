#include "server/sampling/penalties.h"

#include <algorithm>
#include <utility>

namespace mmfree {

Penalties::Penalties(const PenaltyOptions& options, absl::Span<const int32_t> context)
    : options_(options) {
  if (!options_.repeats()) return;
  const size_t count = std::min<size_t>(context.size(), options_.repetition_window);
  for (const int32_t token : context.last(count)) AddToWindow(token);
}

void Penalties::AddToWindow(int32_t token) {
  ++in_window_[token];
  if (window_.size() < options_.repetition_window) {
    window_.push_back(token);
    return;
  }
  const int32_t gone = std::exchange(window_[oldest_], token);
  oldest_ = (oldest_ + 1) % window_.size();
  const auto it = in_window_.find(gone);
  if (--it->second == 0) in_window_.erase(it);
}

void Penalties::Append(int32_t token) {
  if (options_.repeats()) AddToWindow(token);
  if (options_.frequency != 0.0f || options_.presence != 0.0f) ++emitted_[token];
}

void Penalties::Apply(absl::Span<float> logits) const {
  for (const auto& [token, count] : in_window_) {
    float& l = logits[token];
    l = l > 0.0f ? l / options_.repetition : l * options_.repetition;
  }
  for (const auto& [token, count] : emitted_) {
    float& l = logits[token];
    l = (l - options_.frequency * static_cast<float>(count)) - options_.presence;
  }
}

}  // namespace mmfree
