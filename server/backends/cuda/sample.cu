// Sampling and scoring: the definition of server/sampling/sampler.h, one block a row of logits.
//
// Each warp owns a contiguous range of ids. Maxima are 64-bit keys (value, then lowest id); weights
// are 64-bit integers, so their sums have no order.
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/sample_block.cuh"
#include "server/sampling/sampler.h"

namespace mmfree::cuda {
namespace {

struct SampleArgs {
  const float* logits;  // [rows][ld]
  int64_t ld;
  int32_t vocab;
  StepInputs in;
  int32_t row_offset;
  HeadStats* stats;
  HeadOutput* out;
};

__global__ void __launch_bounds__(kSampleThreads) SampleKernel(const SampleArgs args) {
  __shared__ uint64_t key_warps[kSampleWarps];
  __shared__ uint64_t allowed_warps[kSampleWarps];
  __shared__ uint64_t total_warps[kSampleWarps];
  __shared__ uint64_t tempered_warps[kSampleWarps];
  __shared__ int32_t drawn;

  WaitForPrevious();
  AllowNext();
  const int32_t row = args.row_offset + static_cast<int32_t>(blockIdx.x);
  if (row >= args.in.counts->heads) return;
  const HeadInput head = args.in.heads[row];
  const float* const logits = args.logits + blockIdx.x * args.ld;
  const int32_t* const banned = args.in.banned + head.banned_begin;
  const int banned_count = head.banned_count;
  const IdRange range = WarpRange(args.vocab);

  uint64_t key = 0;
  uint64_t allowed_key = 0;
  VisitLogits(logits, range, [&](float logit, int32_t id) {
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
  VisitLogits(logits, range, [&](float logit, int32_t id) {
    total += LogitWeight(logit, max_logit, 1.0f);
    if (tempered && (banned_count == 0 || !IsBanned(banned, banned_count, id))) {
      tempered_total += LogitWeight(logit, max_allowed, inverse);
    }
  });
  total = BlockReduce(total, total_warps, Sum());
  if (tempered) {
    tempered_total = BlockReduce(tempered_total, tempered_warps, Sum());
    if (tempered_total > 0) {
      const uint64_t draw =
          MulHigh64(UniformBits(head.seed, head.position, head.candidate, 0), tempered_total);
      token = FindInIdOrder(tempered_warps, &drawn, args.vocab, draw + 1, [&](int32_t id) {
        return banned_count > 0 && IsBanned(banned, banned_count, id)
                   ? uint64_t{0}
                   : LogitWeight(logits[id], max_allowed, inverse);
      });
    }
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
    args.stats[blockIdx.x] = {total, max_logit};
  }
}

}  // namespace

cudaError_t LaunchSample(const float* logits, int64_t ld, int32_t vocab, const StepInputs& in,
                         int32_t row_offset, int32_t max_rows, HeadStats* stats, HeadOutput* out,
                         const LaunchContext& context) {
  const SampleArgs args = {logits, ld, vocab, in, row_offset, stats, out};
  return Launch<SampleKernel>(context, dim3(max_rows), dim3(kSampleThreads), 0, args);
}

}  // namespace mmfree::cuda
