#include "server/sampling/penalties.h"

#include <algorithm>
#include <utility>

namespace mmfree {

void TokenCounts::Add(int32_t token) {
  const auto [it, is_new] = index_.try_emplace(token, entries_.size());
  if (is_new) {
    entries_.push_back({token, 1});
  } else {
    ++entries_[it->second].count;
  }
}

void TokenCounts::Remove(int32_t token) {
  const auto it = index_.find(token);
  const size_t at = it->second;
  if (--entries_[at].count > 0) return;
  index_.erase(it);
  if (at + 1 < entries_.size()) {
    entries_[at] = entries_.back();
    index_[entries_[at].token] = at;
  }
  entries_.pop_back();
}

void ApplyPenalties(const PenaltyOptions& options, absl::Span<const TokenCount> window,
                    absl::Span<const TokenCount> emitted, absl::Span<float> logits) {
  for (const TokenCount& seen : window) {
    float& l = logits[seen.token];
    l = l > 0.0f ? l / options.repetition : l * options.repetition;
  }
  for (const TokenCount& seen : emitted) {
    float& l = logits[seen.token];
    l = (l - options.frequency * static_cast<float>(seen.count)) - options.presence;
  }
}

Penalties::Penalties(const PenaltyOptions& options, absl::Span<const int32_t> context)
    : options_(options) {
  if (!options_.repeats()) return;
  const size_t count = std::min<size_t>(context.size(), options_.repetition_window);
  for (const int32_t token : context.last(count)) AddToWindow(token);
}

void Penalties::AddToWindow(int32_t token) {
  in_window_.Add(token);
  if (window_.size() < options_.repetition_window) {
    window_.push_back(token);
    return;
  }
  const int32_t gone = std::exchange(window_[oldest_], token);
  oldest_ = (oldest_ + 1) % window_.size();
  in_window_.Remove(gone);
}

void Penalties::Append(int32_t token) {
  if (options_.repeats()) AddToWindow(token);
  if (options_.frequency != 0.0f || options_.presence != 0.0f) emitted_.Add(token);
}

}  // namespace mmfree
