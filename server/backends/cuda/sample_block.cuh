// What the sampling kernels share: keys that order logits, and reductions over a block of 32 warps
// that each own a contiguous range of ids.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_SAMPLE_BLOCK_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_SAMPLE_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/base/numerics.h"

namespace mmfree::cuda {

inline constexpr int kSampleWarps = 32;
inline constexpr int kSampleThreads = 32 * kSampleWarps;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Orders logits as ArgMax does: NaN below -infinity, -0 equal to +0.
__device__ __forceinline__ uint32_t OrderedLogit(float logit) {
  const uint32_t bits = logit == 0.0f ? 0u : FloatToBits(logit);
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return logit != logit ? 0u : ordered;
}

// The same, the lowest id first; never 0.
__device__ __forceinline__ uint64_t ArgMaxKey(float logit, int32_t id) {
  return (static_cast<uint64_t>(OrderedLogit(logit)) << 32) |
         (0xffffffffu - static_cast<uint32_t>(id));
}

__device__ __forceinline__ int32_t IdOfKey(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

struct Maximum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

template <typename Op>
__device__ uint64_t WarpReduce(uint64_t value, Op op) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, stride));
  }
  return value;
}

// Leaves each warp's result in `warps` [kSampleWarps] and returns the block's to every thread.
template <typename Op>
__device__ uint64_t BlockReduce(uint64_t value, uint64_t* warps, Op op) {
  value = WarpReduce(value, op);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return WarpReduce(warps[threadIdx.x % 32], op);
}

// The lane's sum of the values of the lanes up to itself.
__device__ __forceinline__ uint64_t WarpRunningSum(uint64_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, value, stride);
    if (lane >= stride) value += below;
  }
  return value;
}

// The warp's range of ids; begins at a multiple of 32.
struct IdRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ int32_t IdsOfWarp(int32_t vocab) {
  return (vocab + kSampleThreads - 1) / kSampleThreads * 32;
}
__device__ __forceinline__ int32_t WarpOf(int32_t id, int32_t vocab) {
  return id / IdsOfWarp(vocab);
}
__device__ __forceinline__ IdRange WarpRange(int32_t vocab) {
  const int32_t each = IdsOfWarp(vocab);
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x / 32) * each, vocab);
  return {begin, min(begin + each, vocab)};
}

// Calls visit(logit, id) for this lane's ids of the warp's range, the loads of a batch in flight
// together.
template <typename Visit>
__device__ __forceinline__ void VisitLogits(const float* logits, IdRange range, Visit visit) {
  constexpr int kBatch = 8;
  for (int32_t base = range.begin + static_cast<int32_t>(threadIdx.x % 32); base < range.end;
       base += 32 * kBatch) {
    float values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < range.end) values[i] = logits[base + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < range.end) visit(values[i], base + 32 * i);
    }
  }
}

// The thread's sum of the values of the threads up to itself; `total`: of all of them. Uses `warps`
// [kSampleWarps].
__device__ __forceinline__ uint64_t RunningSum(uint64_t* warps, uint64_t value, uint64_t* total) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint64_t in_warp = WarpRunningSum(value);
  __syncthreads();
  if (lane == 31) warps[warp] = in_warp;
  __syncthreads();
  const uint64_t up_to = WarpRunningSum(warps[lane]);
  *total = __shfl_sync(kAllLanes, up_to, 31);
  return __shfl_sync(kAllLanes, up_to, warp) - warps[warp] + in_warp;
}

// The lowest id such that the amounts of the ids up to it sum to `target` or more. Of amounts whose
// sums over each warp's range are in `warps` and come to `target` at least, which is not 0.
// `found`: in shared memory.
//   amount_of(id) -> uint64_t
template <typename AmountOf>
__device__ int32_t FindInIdOrder(uint64_t* warps, int32_t* found, int32_t vocab, uint64_t target,
                                 AmountOf amount_of) {
  __syncthreads();
  const uint64_t of_warp = warps[threadIdx.x % 32];
  const uint64_t up_to_warp = WarpRunningSum(of_warp);
  const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, up_to_warp >= target))) - 1;
  const uint64_t before = __shfl_sync(kAllLanes, up_to_warp - of_warp, owner);
  // All threads look at that warp's ids, each at some that follow each other.
  const int32_t range = IdsOfWarp(vocab);
  const int32_t each = (range + kSampleThreads - 1) / kSampleThreads;
  const int32_t range_end = min((owner + 1) * range, vocab);
  const int32_t begin = min(owner * range + static_cast<int32_t>(threadIdx.x) * each, range_end);
  const int32_t end = min(begin + each, range_end);
  uint64_t sum = 0;
  for (int32_t id = begin; id < end; ++id) sum += amount_of(id);
  uint64_t total = 0;
  const uint64_t up_to = before + RunningSum(warps, sum, &total);
  if (up_to - sum < target && target <= up_to) {
    uint64_t running = up_to - sum;
    int32_t id = begin;
    while (id + 1 < end && (running += amount_of(id)) < target) ++id;
    *found = id;
  }
  __syncthreads();
  return *found;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_SAMPLE_BLOCK_CUH_
