#include "server/sampling/sampler.h"

#include <cmath>
#include <cstddef>

namespace mmfree {
namespace {

bool Contains(absl::Span<const int32_t> banned, size_t id) {
  return IsBanned(banned.data(), static_cast<int>(banned.size()), static_cast<int32_t>(id));
}

uint64_t TotalWeight(absl::Span<const float> logits, absl::Span<const int32_t> banned,
                     float max_logit, float inverse_temperature) {
  uint64_t total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (Contains(banned, i)) continue;
    total += LogitWeight(logits[i], max_logit, inverse_temperature);
  }
  return total;
}

// The lowest allowed id whose running sum of weights exceeds `draw`; `fallback` when none does.
int32_t Invert(absl::Span<const float> logits, absl::Span<const int32_t> banned, float max_logit,
               float inverse_temperature, uint64_t draw, int32_t fallback) {
  uint64_t sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (Contains(banned, i)) continue;
    sum += LogitWeight(logits[i], max_logit, inverse_temperature);
    if (sum > draw) return static_cast<int32_t>(i);
  }
  return fallback;
}

}  // namespace

int32_t ArgMax(absl::Span<const float> logits, absl::Span<const int32_t> banned) {
  size_t best = logits.size();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (Contains(banned, i)) continue;
    // A number beats the NaN that stands in until the first number is seen.
    if (best == logits.size() || logits[i] > logits[best] ||
        (std::isnan(logits[best]) && !std::isnan(logits[i]))) {
      best = i;
    }
  }
  return best == logits.size() ? 0 : static_cast<int32_t>(best);
}

SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                    uint64_t position) {
  SampledToken result;
  // Of the model's own distribution, for the logprob.
  const float max_logit = logits[ArgMax(logits)];
  const uint64_t total = TotalWeight(logits, {}, max_logit, 1.0f);

  result.token = ArgMax(logits, params.banned);
  if (params.temperature > 0.0f) {
    const float max_allowed = logits[result.token];
    const float inverse = 1.0f / params.temperature;
    const uint64_t tempered = TotalWeight(logits, params.banned, max_allowed, inverse);
    const uint64_t draw =
        MulHigh64(UniformBits(params.seed, position, params.candidate, 0), tempered);
    result.token = Invert(logits, params.banned, max_allowed, inverse, draw, result.token);
  }
  result.logprob = LogProbability(logits[result.token], max_logit, total);
  return result;
}

TokenScore ScoreToken(absl::Span<const float> logits, int32_t target) {
  TokenScore score;
  score.argmax = ArgMax(logits);
  if (target >= 0) {
    const float max_logit = logits[score.argmax];
    score.logprob =
        LogProbability(logits[target], max_logit, TotalWeight(logits, {}, max_logit, 1.0f));
  }
  return score;
}

}  // namespace mmfree
