// Scalar definition of sampling: what every backend's sampler must compute, bit for bit.
// Thread-safe, allocation-free. Shared by the CPU backend and, element by element, by the CUDA
// kernels.
//
// A probability is a 64-bit fixed-point weight, so sums do not depend on their order:
//   weight_i = trunc(Exp((l_i - max l) * (1 / temperature)) * 2^40),  total = sum_i weight_i.
// The draw is floor(u * total / 2^64) with u = UniformBits(seed, position, candidate, 0); the token
// is the lowest id whose running sum in id order exceeds it. Ties of the maximum go to the lowest
// id. NaN logits count as -infinity. Where no weight is positive (infinite logits, all NaN) the
// token is the greedy one.
//
// Banned ids are left out of the draw: of the greedy maximum, and of `max l`, the weights and their
// total at the row's temperature. They stay in the maximum and total (at temperature 1) of the
// reported logprob, which is therefore the model's own: what ScoreToken gives for the same token.
#ifndef MMFREE_SERVER_SAMPLING_SAMPLER_H_
#define MMFREE_SERVER_SAMPLING_SAMPLER_H_

#include <cstdint>

#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/base/numerics.h"
#include "server/base/philox.h"

namespace mmfree {

inline constexpr float kWeightOne = 1099511627776.0f;  // 2^40

// Which distribution SampledToken::logprob and top are of.
enum class DrawLogprobs : uint8_t {
  kNone,      // none: they are 0 and null, and cost nothing
  kModel,     // the model's own, at temperature 1: what ScoreToken gives
  kSampling,  // the one that is drawn from
};

// Fixed-point weight of a logit; inverse_temperature is 1.0f / temperature.
MMFREE_HOST_DEVICE uint64_t LogitWeight(float logit, float max_logit, float inverse_temperature) {
  const float x = (logit - max_logit) * inverse_temperature;
  // A NaN difference (NaN logit, or infinities) fails the comparison and weighs nothing.
  return x > ExpConstants::kLow ? static_cast<uint64_t>(Exp(x) * kWeightOne) : 0;
}

// ln of the probability of a logit at temperature 1, from the total of the weights at
// temperature 1.
MMFREE_HOST_DEVICE float LogProbability(float logit, float max_logit, uint64_t total) {
  // total >= 2^40 (the maximum's own weight), so the quotient is a normal float >= 1.
  const float sum = static_cast<float>(total) * 9.094947017729282e-13f;  // 2^-40
  return (logit - max_logit) - Log(sum);
}

// ln(weight / total), total >= weight > 0.
MMFREE_HOST_DEVICE float LogShare(uint64_t weight, uint64_t total) {
  constexpr float kUnit = 1.0f / kWeightOne;
  return Log(static_cast<float>(weight) * kUnit) - Log(static_cast<float>(total) * kUnit);
}

// Whether `id` is among the `count` ids at `banned`, which are few.
MMFREE_HOST_DEVICE bool IsBanned(const int32_t* banned, int count, int32_t id) {
  for (int i = 0; i < count; ++i) {
    if (banned[i] == id) return true;
  }
  return false;
}

// Lowest id of the largest logit among those not banned; the lowest id not banned when their logits
// are all NaN. `logits` is not empty and not all banned.
int32_t ArgMax(absl::Span<const float> logits, absl::Span<const int32_t> banned = {});

// Draws one token at context position `position` (the number of tokens before it). [vocab_size]
// logits, not all of them banned.
SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                    uint64_t position);

// Scores `target` (-1: none) as the next token.
TokenScore ScoreToken(absl::Span<const float> logits, int32_t target);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_SAMPLER_H_
