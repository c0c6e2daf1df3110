#include "server/backends/cpu/row_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "server/base/philox.h"
#include "server/sampling/sampler.h"

namespace mmfree::cpu {
namespace {

// The lowest id whose running sum of weights exceeds `draw`; `fallback` when none does.
int32_t Invert(const Kernels& kernels, absl::Span<const float> logits, float max_logit,
               float inverse_temperature, uint64_t draw, int32_t fallback) {
  constexpr size_t kBlock = 512;
  uint64_t sum = 0;
  for (size_t first = 0; first < logits.size(); first += kBlock) {
    const absl::Span<const float> block = logits.subspan(first, kBlock);
    const uint64_t weight = kernels.total_weight(block.data(), static_cast<int64_t>(block.size()),
                                                 max_logit, inverse_temperature);
    if (sum + weight <= draw) {
      sum += weight;
      continue;
    }
    for (size_t i = 0; i < block.size(); ++i) {
      sum += LogitWeight(block[i], max_logit, inverse_temperature);
      if (sum > draw) return static_cast<int32_t>(first + i);
    }
  }
  return fallback;
}

// Takes the banned ids out of the draw: a NaN is never the largest and weighs nothing.
void Ban(absl::Span<const int32_t> banned, absl::Span<float> logits) {
  for (int32_t id : banned) logits[id] = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

SampledToken SampleRow(const Kernels& kernels, absl::Span<float> logits,
                       const SamplingParams& params, uint64_t position) {
  const int64_t vocab = static_cast<int64_t>(logits.size());
  const auto arg_max = [&] { return static_cast<int32_t>(kernels.arg_max(logits.data(), vocab)); };
  // Of the model's own distribution, for the logprob.
  int32_t best = arg_max();
  const float max_logit = logits[best];
  const uint64_t total = kernels.total_weight(logits.data(), vocab, max_logit, 1.0f);

  if (!params.banned.empty()) {
    Ban(params.banned, logits);
    best = arg_max();
    const int count = static_cast<int>(params.banned.size());
    // Among logits that are all NaN, too, the token is one that is not banned.
    while (IsBanned(params.banned.data(), count, best)) ++best;
  }
  SampledToken result;
  result.token = best;
  if (params.temperature > 0.0f) {
    const float max_allowed = logits[best];
    const float inverse = 1.0f / params.temperature;
    const uint64_t tempered = kernels.total_weight(logits.data(), vocab, max_allowed, inverse);
    const uint64_t draw =
        MulHigh64(UniformBits(params.seed, position, params.candidate, 0), tempered);
    result.token = Invert(kernels, logits, max_allowed, inverse, draw, best);
  }
  result.logprob = LogProbability(logits[result.token], max_logit, total);
  return result;
}

TokenScore ScoreRow(const Kernels& kernels, absl::Span<const float> logits, int32_t target) {
  const int64_t vocab = static_cast<int64_t>(logits.size());
  TokenScore score;
  score.argmax = static_cast<int32_t>(kernels.arg_max(logits.data(), vocab));
  if (target >= 0) {
    const float max_logit = logits[score.argmax];
    score.logprob = LogProbability(logits[target], max_logit,
                                   kernels.total_weight(logits.data(), vocab, max_logit, 1.0f));
  }
  return score;
}

}  // namespace mmfree::cpu
