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

// Not thread-safe. A copy goes on by itself.
class Penalties {
 public:
  // `context`: the tokens before the output, of which the last repetition_window count.
  Penalties(const PenaltyOptions& options, absl::Span<const int32_t> context);

  // Penalizes in `logits` [vocab_size], in fp32 and one rounding an operation:
  //   seen in the window:  l = l > 0 ? l / repetition : l * repetition
  //   emitted n > 0 times: l = (l - frequency * n) - presence
  void Apply(absl::Span<float> logits) const;

  // The token was emitted.
  void Append(int32_t token);

 private:
  void AddToWindow(int32_t token);

  const PenaltyOptions options_;
  std::vector<int32_t> window_;  // a ring once it is full
  size_t oldest_ = 0;
  absl::flat_hash_map<int32_t, int32_t> in_window_;  // how often
  absl::flat_hash_map<int32_t, int32_t> emitted_;    // how often
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_PENALTIES_H_
