// All stages of a decode step of few rows (decode_stage.cuh) in one kernel: a block on each
// multiprocessor goes through them (persistent_step.cuh).
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/backends/cuda/persistent_step.cuh"

namespace mmfree::cuda {
namespace {

template <int kRows, int kDepth>
__global__ void __launch_bounds__(kBlockThreads, 1)
    PersistentKernel(const __grid_constant__ PersistentDecodeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ PersistentBlock<kRows> block;
  PersistentStep<kRows, kDepth>(args, dynamic_shared, block).Run();
#endif
}

template <int kRows, int kDepth>
cudaError_t LaunchDepth(const PersistentDecodeArgs& args, const LaunchContext& context) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return LaunchWith<PersistentKernel<kRows, kDepth>>(
      context, dim3(static_cast<uint32_t>(args.blocks)), dim3(kBlockThreads),
      static_cast<size_t>(args.shared.bytes), &attribute, 1, args);
}

template <int kRows>
cudaError_t LaunchRows(const PersistentDecodeArgs& args, const LaunchContext& context) {
  switch (args.shared.depth) {
    case 16:
      return LaunchDepth<kRows, 16>(args, context);
    case 12:
      return LaunchDepth<kRows, 12>(args, context);
    case 8:
      return LaunchDepth<kRows, 8>(args, context);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchPersistentDecode(const PersistentDecodeArgs& args, int32_t rows,
                                   const LaunchContext& context) {
  return rows == 1 ? LaunchRows<1>(args, context) : LaunchRows<2>(args, context);
}

}  // namespace mmfree::cuda
