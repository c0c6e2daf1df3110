// What the kernels of norm and quantisation share: a launch by kind, and the step of the
// recurrence.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_QUANTIZE_KINDS_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_QUANTIZE_KINDS_CUH_

#include <cuda_runtime.h>

#include <type_traits>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/kernels.h"

namespace mmfree::cuda {

// Recur of numerics.h for some columns, and the factor that GateOutput has of their new states.
// Overwrites `forget` and `input`.
template <int kCount>
__device__ __forceinline__ void AdvanceBatch(float (&forget)[kCount], float (&input)[kCount],
                                             const float (&lower_bound)[kCount],
                                             float (&states)[kCount], float (&gate)[kCount]) {
  SigmoidBatch(forget, forget);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    forget[i] = fmaf(1.0f - lower_bound[i], forget[i], lower_bound[i]);
  }
  SiluBatch(input, input);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    states[i] = fmaf(forget[i], states[i], input[i] * (1.0f - forget[i]));
  }
  SiluBatch(states, gate);
}

// What `launch` returns, called with the kind as a std::integral_constant.
template <typename Launch>
cudaError_t LaunchForKind(NormKind kind, const Launch& launch) {
  switch (kind) {
    case NormKind::kAttention:
      return launch(std::integral_constant<NormKind, NormKind::kAttention>());
    case NormKind::kHidden:
      return launch(std::integral_constant<NormKind, NormKind::kHidden>());
    case NormKind::kRecurrent:
      return launch(std::integral_constant<NormKind, NormKind::kRecurrent>());
    case NormKind::kScanned:
      return launch(std::integral_constant<NormKind, NormKind::kScanned>());
    case NormKind::kOneNorm:
      return launch(std::integral_constant<NormKind, NormKind::kOneNorm>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_QUANTIZE_KINDS_CUH_
