#include "server/sampling/weights.h"

#include <algorithm>
#include <cstddef>

#include "server/sampling/sampler.h"

namespace mmfree {
namespace {

// Small enough to stay in the first cache between the two passes.
constexpr size_t kBlock = 1024;

// Two loops, so that the first one is made of vector instructions.
inline __attribute__((always_inline)) uint64_t Weigh(const float* logits, size_t count,
                                                     float max_logit, float inverse_temperature,
                                                     uint64_t* weights) {
  float values[kBlock];
  for (size_t i = 0; i < count; ++i) {
    const float x = (logits[i] - max_logit) * inverse_temperature;
    const float value = Exp(x) * kWeightOne;
    values[i] = x > ExpConstants::kLow ? value : 0.0f;
  }
  uint64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    // Below 2^63, so the signed conversion, which is one instruction, does.
    weights[i] = static_cast<uint64_t>(static_cast<int64_t>(values[i]));
    total += weights[i];
  }
  return total;
}

using WeighFunction = uint64_t (*)(const float*, size_t, float, float, uint64_t*);

uint64_t WeighGeneric(const float* logits, size_t count, float max_logit, float inverse_temperature,
                      uint64_t* weights) {
  return Weigh(logits, count, max_logit, inverse_temperature, weights);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) uint64_t WeighFma(const float* logits, size_t count,
                                                      float max_logit, float inverse_temperature,
                                                      uint64_t* weights) {
  return Weigh(logits, count, max_logit, inverse_temperature, weights);
}
#endif

WeighFunction Choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0) return WeighFma;
#endif
  return WeighGeneric;
}

}  // namespace

uint64_t LogitWeights(absl::Span<const float> logits, float max_logit, float inverse_temperature,
                      absl::Span<uint64_t> weights) {
  static const WeighFunction weigh = Choose();
  uint64_t total = 0;
  for (size_t first = 0; first < logits.size(); first += kBlock) {
    total += weigh(logits.data() + first, std::min(kBlock, logits.size() - first), max_logit,
                   inverse_temperature, weights.data() + first);
  }
  return total;
}

}  // namespace mmfree
