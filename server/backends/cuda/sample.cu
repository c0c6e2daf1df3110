// Sampling and scoring: the definition of server/sampling/sampler.h, one block a row of logits.
//
// Each warp owns a contiguous range of ids. Maxima are 64-bit keys (value, then lowest id); weights
// are 64-bit integers, so their sums have no order. The warp whose range the draw falls into walks
// it again.
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/sampling/sampler.h"

namespace mmfree::cuda {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = 32 * kWarps;
constexpr uint32_t kAll = 0xffffffffu;

// Orders logits as ArgMax does: NaN below -infinity, -0 equal to +0, the lowest id first.
__device__ __forceinline__ uint64_t ArgMaxKey(float logit, int32_t id) {
  const uint32_t bits = logit == 0.0f ? 0u : FloatToBits(logit);
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  const uint32_t value = logit != logit ? 0u : ordered;
  return (static_cast<uint64_t>(value) << 32) | (kAll - static_cast<uint32_t>(id));
}

__device__ __forceinline__ int32_t IdOfKey(uint64_t key) {
  return static_cast<int32_t>(kAll - static_cast<uint32_t>(key));
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
    value = op(value, __shfl_xor_sync(kAll, value, stride));
  }
  return value;
}

// Leaves each warp's result in `warps` and returns the block's to every thread.
template <typename Op>
__device__ uint64_t BlockReduce(uint64_t value, uint64_t* warps, Op op) {
  value = WarpReduce(value, op);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return WarpReduce(warps[threadIdx.x % 32], op);
}

// Calls visit(logit, id) for this lane's ids of [begin, end), the loads of a batch in flight
// together.
template <typename Visit>
__device__ __forceinline__ void VisitLogits(const float* logits, int32_t begin, int32_t end,
                                            Visit visit) {
  constexpr int kBatch = 8;
  for (int32_t base = begin + static_cast<int32_t>(threadIdx.x % 32); base < end;
       base += 32 * kBatch) {
    float values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < end) values[i] = logits[base + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < end) visit(values[i], base + 32 * i);
    }
  }
}

struct SampleArgs {
  const float* logits;  // [rows][ld]
  int64_t ld;
  int32_t vocab;
  StepInputs in;
  int32_t row_offset;
  HeadOutput* out;
};

// The lowest id of a warp's range whose running sum exceeds what is left of the draw; -1: none.
__device__ int32_t Invert(const float* logits, int32_t begin, int32_t end, const int32_t* banned,
                          int banned_count, float max_logit, float inverse, uint64_t draw) {
  const int lane = threadIdx.x % 32;
  uint64_t before = 0;
  for (int32_t first = begin; first < end; first += 32) {
    const int32_t id = first + lane;
    uint64_t sum = 0;
    if (id < end && !IsBanned(banned, banned_count, id)) {
      sum = LogitWeight(logits[id], max_logit, inverse);
    }
#pragma unroll
    for (int stride = 1; stride < 32; stride *= 2) {
      const uint64_t below = __shfl_up_sync(kAll, sum, stride);
      if (lane >= stride) sum += below;
    }
    const uint32_t over = __ballot_sync(kAll, before + sum > draw);
    if (over != 0) return first + __ffs(static_cast<int>(over)) - 1;
    before += __shfl_sync(kAll, sum, 31);
  }
  return -1;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const SampleArgs args) {
  __shared__ uint64_t key_warps[kWarps];
  __shared__ uint64_t allowed_warps[kWarps];
  __shared__ uint64_t total_warps[kWarps];
  __shared__ uint64_t tempered_warps[kWarps];
  __shared__ int32_t drawn;

  WaitForPrevious();
  AllowNext();
  const int32_t row = args.row_offset + static_cast<int32_t>(blockIdx.x);
  if (row >= args.in.counts->heads) return;
  const HeadInput head = args.in.heads[row];
  const float* const logits = args.logits + blockIdx.x * args.ld;
  const int32_t* const banned = args.in.banned + head.banned_begin;
  const int banned_count = head.banned_count;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t range = static_cast<int32_t>(RoundUp(CeilDiv(args.vocab, kWarps), 32));
  const int32_t begin = min(warp * range, args.vocab);
  const int32_t end = min(begin + range, args.vocab);

  uint64_t key = 0;
  uint64_t allowed_key = 0;
  VisitLogits(logits, begin, end, [&](float logit, int32_t id) {
    const uint64_t candidate = ArgMaxKey(logit, id);
    key = Maximum()(key, candidate);
    if (banned_count == 0 || !IsBanned(banned, banned_count, id)) {
      allowed_key = Maximum()(allowed_key, candidate);
    }
  });
  key = BlockReduce(key, key_warps, Maximum());
  allowed_key = BlockReduce(allowed_key, allowed_warps, Maximum());
  const int32_t best = IdOfKey(key);
  const float max_logit = logits[best];
  int32_t token = IdOfKey(allowed_key);
  const float max_allowed = logits[token];

  const bool tempered = head.temperature > 0.0f;
  const float inverse = tempered ? 1.0f / head.temperature : 0.0f;
  uint64_t total = 0;
  uint64_t tempered_total = 0;
  VisitLogits(logits, begin, end, [&](float logit, int32_t id) {
    total += LogitWeight(logit, max_logit, 1.0f);
    if (tempered && (banned_count == 0 || !IsBanned(banned, banned_count, id))) {
      tempered_total += LogitWeight(logit, max_allowed, inverse);
    }
  });
  total = BlockReduce(total, total_warps, Sum());
  if (tempered) {
    if (threadIdx.x == 0) drawn = -1;
    tempered_total = BlockReduce(tempered_total, tempered_warps, Sum());
    uint64_t draw =
        MulHigh64(UniformBits(head.seed, head.position, head.candidate, 0), tempered_total);
    // The first warp whose range takes the running sum past the draw.
    uint64_t before = 0;
    int owner = 0;
    while (owner < kWarps && before + tempered_warps[owner] <= draw) {
      before += tempered_warps[owner++];
    }
    if (warp == owner) {
      const int32_t id =
          Invert(logits, begin, end, banned, banned_count, max_allowed, inverse, draw - before);
      if (lane == 0) drawn = id;
    }
    __syncthreads();
    if (drawn >= 0) token = drawn;
  }
  if (threadIdx.x == 0) {
    HeadOutput out;
    const bool sampled = head.temperature >= 0.0f;
    out.sampled = sampled ? token : -1;
    out.sampled_logprob = sampled ? LogProbability(logits[token], max_logit, total) : 0.0f;
    out.argmax = best;
    out.target_logprob =
        head.target >= 0 ? LogProbability(logits[head.target], max_logit, total) : 0.0f;
    args.out[row] = out;
  }
}

}  // namespace

cudaError_t LaunchSample(const float* logits, int64_t ld, int32_t vocab, const StepInputs& in,
                         int32_t row_offset, int32_t max_rows, HeadOutput* out,
                         const LaunchContext& context) {
  const SampleArgs args = {logits, ld, vocab, in, row_offset, out};
  return Launch<SampleKernel>(context, dim3(max_rows), dim3(kThreads), 0, args);
}

}  // namespace mmfree::cuda
