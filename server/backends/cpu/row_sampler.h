// server/sampling with the kernels of an instruction set.
#ifndef MMFREE_SERVER_BACKENDS_CPU_ROW_SAMPLER_H_
#define MMFREE_SERVER_BACKENDS_CPU_ROW_SAMPLER_H_

#include <cstdint>

#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu {

// The same results as Sample and ScoreToken of server/sampling/sampler.h, bit for bit.
// SampleRow overwrites the logits of banned tokens.
SampledToken SampleRow(const Kernels& kernels, absl::Span<float> logits,
                       const SamplingParams& params, uint64_t position);
TokenScore ScoreRow(const Kernels& kernels, absl::Span<const float> logits, int32_t target);

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_ROW_SAMPLER_H_
