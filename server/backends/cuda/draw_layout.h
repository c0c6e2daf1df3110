// The draws that a device makes by itself (server/sampling/token_draw.h), laid out for it. Host and
// device.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DRAW_LAYOUT_H_
#define MMFREE_SERVER_BACKENDS_CUDA_DRAW_LAYOUT_H_

#include <cstdint>

#include "server/backends/backend.h"

namespace mmfree::cuda {

// Alternatives that a device lists; a draw with more is the host's.
inline constexpr int32_t kMaxDrawAlternatives = 20;

// Of the model's own distribution, for each row of logits.
struct alignas(16) HeadStats {
  uint64_t total;   // of the weights at temperature 1
  float max_logit;  // NaN when all are
};

// An id and what to do with its logit: a bias' bits, a count, or nothing more.
struct alignas(8) DrawEntry {
  int32_t id;
  uint32_t value;
};

inline constexpr int32_t kNoMask = -1;
// A share (filters.h, FixedShare) that filters nothing.
inline constexpr uint64_t kShareOff = ~uint64_t{0};

struct alignas(16) DrawInput {
  uint64_t seed;
  uint64_t position;
  uint64_t typical_share;  // in units of 2^-40, like the next
  uint64_t top_p_share;
  uint64_t min_p_share;
  float temperature;
  uint32_t candidate;
  float repetition;
  float frequency;
  float presence;
  uint32_t top_k;      // 0: off
  int32_t head;        // of the step
  int32_t allowed;     // index of the mask; kNoMask: all
  int32_t constraint;  // likewise
  uint8_t may_end;
  uint8_t logprobs;  // a DrawLogprobs
  uint16_t top_logprobs;
  int32_t entries;  // where the entries begin: so many of each of these
  int32_t ends;
  int32_t banned;
  int32_t bias;
  int32_t window;
  int32_t emitted;
};

struct alignas(16) DrawOutput {
  int32_t token;  // -1: there were no choices
  float logprob;
  int32_t num_top;
  TokenAlternative top[kMaxDrawAlternatives];  // [num_top], likeliest first
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DRAW_LAYOUT_H_
