// What the blocks of the persistent decode kernel tell each other: the outputs of stages, through
// buffers in which a place holds kMissing until its value is there. A reader polls the values
// themselves; no barrier and no fence lies between a value's store and its use.
//
// Each layer has a set of buffers, and kExchangeSets sets are used in turn, from launch to launch.
// Whoever writes a place at layer l puts kMissing back into the same place of layer l - 1's set
// right after. A block writes outputs of a stage only after it has read all inputs of it, every
// block has work in some stage of each layer (persistent_plan.cc), and inputs of a stage are the
// outputs of the one before (of the head: of the last layer's last). So whoever has all inputs of a
// stage knows of every block with work in an earlier stage that it has read its inputs there and
// written its outputs. Hence
//   - nobody reads the place of layer l - 1 any more: the stage that does is over where layer l
//     writes the same kind of output;
//   - nobody finds the old value at layer l + 2, when the set is used again: whoever comes to read
//     there has worked at layer l + 2 or l + 1, so that all places of the kind were written at
//     layer l + 1, before which each block fenced what it had written at layer l.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_EXCHANGE_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_EXCHANGE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/kernels.h"
#include "server/base/numerics.h"

namespace mmfree::cuda {

// A NaN that no operation gives.
inline constexpr uint32_t kMissing = kExchangeMissing;

__device__ __forceinline__ bool IsMissing(float value) { return FloatToBits(value) == kMissing; }
__device__ __forceinline__ bool AnyMissing(const float4& values) {
  return IsMissing(values.x) || IsMissing(values.y) || IsMissing(values.z) || IsMissing(values.w);
}

__device__ __forceinline__ float4 LoadExchanged(const float* from) {
  float4 values;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "l"(from)
               : "memory");
  return values;
}

__device__ __forceinline__ void StoreExchanged(float* to, float value) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
__device__ __forceinline__ void StoreExchanged(float* to, const float2& values) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(values.x), "f"(values.y)
               : "memory");
}

__device__ __forceinline__ void Fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// The value as it is written: even a NaN from a file must not look as if it were missing.
__device__ __forceinline__ float Present(float value) {
  return IsMissing(value) ? BitsToFloat(0x7fffffffu) : value;
}

// A thread's places in the present set and in the one before.
class Places {
 public:
  __device__ __forceinline__ Places(const PersistentExchange& exchange, int set)
      : present_(exchange.first + int64_t{set} * exchange.set_floats),
        last_(exchange.first +
              int64_t{set == 0 ? kExchangeSets - 1 : set - 1} * exchange.set_floats) {}

  // Of the present set, and of the one before.
  __device__ __forceinline__ const float* present() const { return present_; }
  __device__ __forceinline__ const float* last() const { return last_; }

  // Writes a place `at` of the present set and takes back what it held in the set before.
  __device__ __forceinline__ void Write(int at, float value) const {
    StoreExchanged(present_ + at, Present(value));
    StoreExchanged(last_ + at, BitsToFloat(kMissing));
  }
  __device__ __forceinline__ void Write(int at, const float2& values) const {
    StoreExchanged(present_ + at, make_float2(Present(values.x), Present(values.y)));
    StoreExchanged(last_ + at, make_float2(BitsToFloat(kMissing), BitsToFloat(kMissing)));
  }

 private:
  float* const present_;
  float* const last_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_EXCHANGE_CUH_
