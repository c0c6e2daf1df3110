// Repetition, frequency and presence penalties, and the history they are about.
#ifndef MMFREE_SERVER_SAMPLING_PENALTIES_H_
#define MMFREE_SERVER_SAMPLING_PENALTIES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"

namespace mmfree {

struct PenaltyOptions {
  float repetition = 1.0f;          // > 0; 1: off
  uint32_t repetition_window = 64;  // tokens of the context it looks back over; 0: off
  float frequency = 0.0f;           // 0: off
  float presence = 0.0f;            // 0: off

  bool repeats() const { return repetition != 1.0f && repetition_window > 0; }
  bool any() const { return repeats() || frequency != 0.0f || presence != 0.0f; }
};

struct TokenCount {
  int32_t token = 0;
  int32_t count = 0;
};

// How often tokens occur. The list of them is dense, so that going over it costs what it holds.
class TokenCounts {
 public:
  void Add(int32_t token);
  // `token` occurs.
  void Remove(int32_t token);

  // Distinct tokens, in no particular order; valid until the next change.
  absl::Span<const TokenCount> entries() const { return entries_; }

 private:
  std::vector<TokenCount> entries_;
  absl::flat_hash_map<int32_t, size_t> index_;  // in entries_, by token
};

// Penalizes in `logits` [vocab_size], in fp32 and one rounding an operation:
//   in `window`:         l = l > 0 ? l / repetition : l * repetition
//   emitted n > 0 times: l = (l - frequency * n) - presence
void ApplyPenalties(const PenaltyOptions& options, absl::Span<const TokenCount> window,
                    absl::Span<const TokenCount> emitted, absl::Span<float> logits);

// The history that penalties are about. Not thread-safe. A copy goes on by itself.
class Penalties {
 public:
  // `context`: the tokens before the output, of which the last repetition_window count.
  Penalties(const PenaltyOptions& options, absl::Span<const int32_t> context);

  // Tokens among the last repetition_window of the context; empty without a penalty for them.
  absl::Span<const TokenCount> window() const { return in_window_.entries(); }
  // Tokens of the output; empty without a penalty for them.
  absl::Span<const TokenCount> emitted() const { return emitted_.entries(); }

  // The token was emitted.
  void Append(int32_t token);

 private:
  void AddToWindow(int32_t token);

  const PenaltyOptions options_;
  std::vector<int32_t> window_;  // a ring once it is full
  size_t oldest_ = 0;
  TokenCounts in_window_;
  TokenCounts emitted_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_PENALTIES_H_
