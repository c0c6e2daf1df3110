// What the kernels of this build were compiled for.
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"

namespace mmfree::cuda {
namespace {

__global__ void ProbeKernel(int32_t* has_wgmma) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  *has_wgmma = 1;
#else
  *has_wgmma = 0;
#endif
}

}  // namespace

cudaError_t QueryKernelBuild(bool* has_wgmma) {
  int32_t* on_device = nullptr;
  cudaError_t error = cudaMalloc(&on_device, sizeof(*on_device));
  if (error != cudaSuccess) return error;
  ProbeKernel<<<1, 1>>>(on_device);
  error = cudaGetLastError();
  int32_t on_host = 0;
  if (error == cudaSuccess) {
    error = cudaMemcpy(&on_host, on_device, sizeof(on_host), cudaMemcpyDeviceToHost);
  }
  const cudaError_t freed = cudaFree(on_device);
  *has_wgmma = on_host != 0;
  return error != cudaSuccess ? error : freed;
}

}  // namespace mmfree::cuda
