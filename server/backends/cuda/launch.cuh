// Launch and device primitives shared by the kernels.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_LAUNCH_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "server/backends/cuda/kernels.h"

namespace mmfree::cuda {

// Prepares `kKernel` for up to `shared_bytes` of dynamic shared memory on the current device; a
// call into the driver only the first time and when it grows.
template <auto kKernel>
cudaError_t Prepare(size_t shared_bytes) {
  constexpr int kMaxDevices = 64;
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  static std::atomic<size_t> prepared[kMaxDevices];  // bytes + 1
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  std::atomic<size_t>* const known = device < kMaxDevices ? &prepared[device] : nullptr;
  if (known != nullptr && known->load(std::memory_order_relaxed) > shared_bytes) {
    return cudaSuccess;
  }
  // One split of L1 and shared memory for all: a multiprocessor drains before it changes the split,
  // and kernels that want different ones cannot overlap.
  cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess && known != nullptr) known->store(shared_bytes + 1);
  return error;
}

// Launches `kKernel` on the context's stream.
template <auto kKernel, typename... Args>
cudaError_t LaunchWith(const LaunchContext& context, dim3 grid, dim3 block, size_t shared_bytes,
                       cudaLaunchAttribute* attributes, unsigned num_attributes,
                       const Args&... args) {
  if (const cudaError_t error = Prepare<kKernel>(shared_bytes); error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

// Launches `kKernel` on the context's stream; with overlap, as a programmatic dependent of the
// previous kernel there, which every kernel answers with WaitForPrevious().
template <auto kKernel, typename... Args>
cudaError_t Launch(const LaunchContext& context, dim3 grid, dim3 block, size_t shared_bytes,
                   const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return LaunchWith<kKernel>(context, grid, block, shared_bytes, &attribute,
                             context.overlap ? 1 : 0, args...);
}

// Blocks until the previous kernel's writes are visible. Every kernel calls it in every block that
// does anything, so that the end of a kernel implies the end of all before it.
__device__ __forceinline__ void WaitForPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be placed as soon as there is room for them.
__device__ __forceinline__ void AllowNext() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// c[16x8] += a[16x32] (u8 codes) * b[32x8] (s8), one warp.
__device__ __forceinline__ void Mma(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The A fragment of one k-step from its word of codes (layout.h); registers 1 and 3 come times 4.
struct WeightFragment {
  uint32_t a0, a1, a2, a3;
};
__device__ __forceinline__ WeightFragment Unpack(uint32_t word) {
  const uint32_t high = word >> 4;
  return {word & 0x03030303u, word & 0x0c0c0c0cu, high & 0x03030303u, high & 0x0c0c0c0cu};
}

// 16 bytes of weights, read once.
__device__ __forceinline__ uint4 LoadWeights(const uint8_t* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void PrefetchL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_LAUNCH_CUH_
