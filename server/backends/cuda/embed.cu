// The first kernels of a step: its inputs from pinned memory, and the embedding rows.
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {
namespace {

constexpr int kLoadThreads = 256;
constexpr int kLoadBlocks = 8;
constexpr int kEmbedThreads = 256;

template <typename T>
__device__ void CopyArray(const T* from, T* to, int64_t count) {
  // The arrays start aligned and have room for a whole last vector.
  const int64_t vectors = (count * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  for (int64_t i = blockIdx.x * kLoadThreads + threadIdx.x; i < vectors;
       i += kLoadBlocks * kLoadThreads) {
    reinterpret_cast<int4*>(to)[i] = reinterpret_cast<const int4*>(from)[i];
  }
}

__global__ void __launch_bounds__(kLoadThreads)
    LoadInputsKernel(const StepInputs host, const StepInputs device) {
  WaitForPrevious();
  AllowNext();
  const StepCounts counts = *host.counts;
  CopyArray(host.tokens, device.tokens, counts.tokens);
  CopyArray(host.rows, device.rows, counts.rows);
  CopyArray(host.heads, device.heads, counts.heads);
  if (blockIdx.x == 0 && threadIdx.x == 0) *device.counts = counts;
}

template <EmbeddingType kType>
__global__ void __launch_bounds__(kEmbedThreads)
    EmbedKernel(const void* table, int64_t dim, const StepInputs in, float* h, int64_t ld) {
  WaitForPrevious();
  AllowNext();
  const int32_t n = blockIdx.x;
  if (n >= in.counts->tokens) return;
  const int64_t first = in.tokens[n] * dim;
  for (int64_t k = threadIdx.x; k < ld; k += kEmbedThreads) {
    float value = 0.0f;
    if (k < dim) {
      if constexpr (kType == EmbeddingType::kF32) {
        value = static_cast<const float*>(table)[first + k];
      } else if constexpr (kType == EmbeddingType::kF16) {
        value = HalfToFloat(static_cast<const uint16_t*>(table)[first + k]);
      } else {
        value = Bfloat16ToFloat(static_cast<const uint16_t*>(table)[first + k]);
      }
    }
    h[n * ld + k] = value;
  }
}

}  // namespace

cudaError_t LaunchLoadInputs(const StepInputs& host, const StepInputs& device,
                             const LaunchContext& context) {
  return Launch<LoadInputsKernel>(context, dim3(kLoadBlocks), dim3(kLoadThreads), 0, host, device);
}

cudaError_t LaunchEmbed(const void* table, EmbeddingType type, int64_t dim, const StepInputs& in,
                        int32_t max_tokens, float* h, int64_t ld, const LaunchContext& context) {
  const dim3 grid(max_tokens);
  const dim3 block(kEmbedThreads);
  switch (type) {
    case EmbeddingType::kF32:
      return Launch<EmbedKernel<EmbeddingType::kF32>>(context, grid, block, 0, table, dim, in, h,
                                                      ld);
    case EmbeddingType::kF16:
      return Launch<EmbedKernel<EmbeddingType::kF16>>(context, grid, block, 0, table, dim, in, h,
                                                      ld);
    case EmbeddingType::kBF16:
      return Launch<EmbedKernel<EmbeddingType::kBF16>>(context, grid, block, 0, table, dim, in, h,
                                                       ld);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmfree::cuda
