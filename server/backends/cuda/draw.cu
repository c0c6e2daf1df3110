// Draws with options: DrawToken of server/sampling/token_draw.h, one block a draw.
//
// The block works on its own copy of the row, in shared memory where it fits. What cannot be
// chosen, or is filtered out, is a NaN of its own there, so that each step is a pass over the row.
#include <cuda_runtime.h>

#include <algorithm>

#include "server/backends/cuda/draw_select.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/sample_block.cuh"
#include "server/sampling/filters.h"
#include "server/sampling/sampler.h"

namespace mmfree::cuda {
namespace {

// No operation gives this NaN, and no NaN logit is stored as it.
constexpr uint32_t kExcludedBits = 0xffffffffu;
constexpr uint32_t kNotANumberBits = 0x7fffffffu;

__device__ __forceinline__ bool IsExcluded(float value) {
  return FloatToBits(value) == kExcludedBits;
}

// What every step has at hand. Weights are those at the draw's temperature.
struct Draw {
  const DrawInput& in;
  const DrawEntry* entries;  // [ends, banned, bias, window, emitted]
  const float* raw;          // [vocab] the model's logits
  float* values;             // [vocab] of the draw
  int32_t vocab;
  IdRange range;
  float max_logit;
  float inverse_temperature;

  __device__ uint64_t Weight(float value) const {
    return LogitWeight(value, max_logit, inverse_temperature);
  }
  __device__ bool HasWeight(float value) const {
    const float x = (value - max_logit) * inverse_temperature;
    // exp(x) * 2^40 is surely 1 or more, or surely less; false for a NaN.
    constexpr float kHeavy = -27.0f;
    constexpr float kLight = -29.0f;
    return x > kHeavy || (x > kLight && Weight(value) > 0);
  }
  __device__ void Exclude(int32_t id) const { values[id] = BitsToFloat(kExcludedBits); }
  __device__ uint32_t InformationOf(float value) const {
    return Information(value, max_logit, inverse_temperature);
  }
};

// The orders of draw_select.cuh: the logit falling,
struct ByLikelihood {
  const Draw& draw;
  __device__ uint32_t High(float value) const {
    return min(draw.InformationOf(value), kKeyHighMax);
  }
  __device__ uint32_t Low(float value) const { return ~OrderedLogit(value); }
};
// the distance to the mean information rising,
struct ByTypicality {
  const Draw& draw;
  uint32_t mean;
  __device__ uint32_t High(float value) const {
    const uint32_t information = draw.InformationOf(value);
    return min(information > mean ? information - mean : mean - information, kKeyHighMax);
  }
  __device__ uint32_t Low(float /*value*/) const { return 0; }
};
// the model's logit falling, where NaN is -infinity,
struct ByModel {
  float likeliest;
  __device__ static float Comparable(float value) {
    return value != value ? BitsToFloat(0xff800000u) : value;
  }
  __device__ uint32_t High(float value) const {
    const float comparable = Comparable(value);
    if (comparable == likeliest) return 0;
    // What is far behind, or not by a finite number, is told by the value alone.
    const float behind = (likeliest - comparable) * kInformationOne;
    return behind < static_cast<float>(kKeyHighMax) ? static_cast<uint32_t>(behind) : kKeyHighMax;
  }
  __device__ uint32_t Low(float value) const { return ~OrderedLogit(Comparable(value)); }
};
// and the weight falling: rounded down to a float, from 1 to 2^40, and then its last bits.
struct ByWeight {
  const Draw& draw;
  __device__ uint32_t High(float value) const {
    constexpr uint32_t kLargest = 0x53800000u;
    const uint64_t weight = draw.Weight(value);
    return weight == 0 ? kKeyHighMax : kLargest - FloatToBits(__ull2float_rz(weight));
  }
  __device__ uint32_t Low(float value) const { return ~static_cast<uint32_t>(draw.Weight(value)); }
};

__device__ __forceinline__ bool HasId(const DrawArgs& args, int32_t mask, int32_t id) {
  return mask == kNoMask || ((args.masks[mask * args.mask_words + id / 32] >> (id % 32)) & 1) != 0;
}

// Fills draw.values: choices, bias, penalties. Lists have distinct ids where values change.
__device__ void LoadValues(const Draw& draw, const DrawArgs& args) {
  constexpr int kLists = 5;
  const DrawInput& in = draw.in;
  const int32_t counts[kLists] = {in.ends, in.banned, in.bias, in.window, in.emitted};
  // The thread's first entry of each list, on its way while the row is read.
  DrawEntry entries[kLists];
  const DrawEntry* lists[kLists];
  const DrawEntry* next = draw.entries;
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    lists[i] = next;
    if (static_cast<int32_t>(threadIdx.x) < counts[i]) entries[i] = next[threadIdx.x];
    next += counts[i];
  }
  float* const values = draw.values;
  const auto stored = [](float logit) {
    return logit != logit ? BitsToFloat(kNotANumberBits) : logit;
  };
  VisitLogits(draw.raw, draw.range, [&](float logit, int32_t id) {
    const bool chosen = HasId(args, in.allowed, id) && HasId(args, in.constraint, id);
    values[id] = chosen ? stored(logit) : BitsToFloat(kExcludedBits);
  });
  __syncthreads();
  const auto for_each = [&](int list, auto apply) {
    const int32_t count = counts[list];
    if (count == 0) return;
    if (static_cast<int32_t>(threadIdx.x) < count) apply(entries[list]);
    for (int32_t i = threadIdx.x + kSampleThreads; i < count; i += kSampleThreads) {
      apply(lists[list][i]);
    }
    __syncthreads();
  };
  const auto change = [values](int32_t id, auto next_value) {
    if (!IsExcluded(values[id])) values[id] = next_value(values[id]);
  };
  for_each(0, [&](DrawEntry entry) {
    const bool chosen = in.may_end != 0 && HasId(args, in.allowed, entry.id);
    values[entry.id] = chosen ? stored(draw.raw[entry.id]) : BitsToFloat(kExcludedBits);
  });
  for_each(1, [&](DrawEntry entry) { values[entry.id] = BitsToFloat(kExcludedBits); });
  for_each(2, [&](DrawEntry entry) {
    change(entry.id, [&](float l) { return l + BitsToFloat(entry.value); });
  });
  for_each(3, [&](DrawEntry entry) {
    change(entry.id, [&](float l) { return l > 0.0f ? l / in.repetition : l * in.repetition; });
  });
  for_each(4, [&](DrawEntry entry) {
    const float count = static_cast<float>(static_cast<int32_t>(entry.value));
    change(entry.id, [&](float l) { return (l - in.frequency * count) - in.presence; });
  });
}

// The sum of the weights; leaves those of the warps' ranges in shared.warps.
__device__ uint64_t TotalWeight(const Draw& draw, SelectShared& shared) {
  uint64_t total = 0;
  VisitLogits(draw.values, draw.range, [&](float value, int32_t) { total += draw.Weight(value); });
  return Reduce(shared, total, Sum());
}

// Each filter returns the sum of the weights that it leaves, as TotalWeight does.

__device__ uint64_t KeepTopK(const Draw& draw, SelectShared& shared) {
  KeepPrefix(
      shared, draw.values, draw.vocab, ByLikelihood{draw},
      [&](float value) { return draw.HasWeight(value) ? uint64_t{1} : uint64_t{0}; },
      static_cast<uint64_t>(draw.vocab), [&](uint64_t) { return uint64_t{draw.in.top_k}; },
      [&](int32_t id) { draw.Exclude(id); });
  __syncthreads();
  return TotalWeight(draw, shared);
}

// `most`: the sum of the weights, at most.
template <typename Order>
__device__ uint64_t KeepShare(const Draw& draw, const Order& order, uint64_t share, uint64_t most,
                              SelectShared& shared) {
  const uint64_t kept = KeepPrefix(
      shared, draw.values, draw.vocab, order, [&](float value) { return draw.Weight(value); }, most,
      [&](uint64_t total) { return ShareOf(share, total); }, [&](int32_t id) { draw.Exclude(id); });
  __syncthreads();
  return kept;
}

__device__ uint64_t KeepTypical(const Draw& draw, SelectShared& shared) {
  // sum of weight * information, in three parts whose sums fit: 14 bits of the weight each.
  constexpr int kPartBits = 14;
  constexpr uint64_t kPart = (uint64_t{1} << kPartBits) - 1;
  uint64_t total = 0;
  uint64_t parts[3] = {};
  VisitLogits(draw.values, draw.range, [&](float value, int32_t) {
    const uint64_t weight = draw.Weight(value);
    if (weight == 0) return;
    const uint64_t information = draw.InformationOf(value);
    total += weight;
    parts[0] += (weight & kPart) * information;
    parts[1] += ((weight >> kPartBits) & kPart) * information;
    parts[2] += (weight >> (2 * kPartBits)) * information;
  });
  total = Reduce(shared, total, Sum());
  if (total == 0) return 0;
  for (uint64_t& part : parts) part = Reduce(shared, part, Sum());
  // moment = parts[0] + parts[1] * 2^14 + parts[2] * 2^28, in two words.
  uint64_t low = parts[0];
  uint64_t high = 0;
  for (int i = 1; i < 3; ++i) {
    const uint64_t part = parts[i] << (i * kPartBits);
    low += part;
    high += (parts[i] >> (64 - i * kPartBits)) + (low < part ? 1 : 0);
  }
  // floor(moment / total): within one of the quotient of the rounded numbers, as it is below 2^29.
  const double moment =
      static_cast<double>(high) * 18446744073709551616.0 + static_cast<double>(low);
  uint64_t mean = static_cast<uint64_t>(moment / static_cast<double>(total));
  const auto reaches = [&](uint64_t quotient) {  // quotient * total <= moment
    const uint64_t product_high = MulHigh64(quotient, total);
    return product_high != high ? product_high < high : quotient * total <= low;
  };
  while (!reaches(mean)) --mean;
  while (reaches(mean + 1)) ++mean;
  const ByTypicality order = {draw, static_cast<uint32_t>(mean)};
  return KeepShare(draw, order, draw.in.typical_share, total, shared);
}

__device__ uint64_t KeepAtLeast(const Draw& draw, SelectShared& shared) {
  uint64_t largest = 0;
  VisitLogits(draw.values, draw.range,
              [&](float value, int32_t) { largest = Maximum()(largest, draw.Weight(value)); });
  const uint64_t least = ShareOf(draw.in.min_p_share, Reduce(shared, largest, Maximum()));
  uint64_t total = 0;
  VisitLogits(draw.values, draw.range, [&](float value, int32_t id) {
    const uint64_t weight = draw.Weight(value);
    if (weight < least) {
      draw.Exclude(id);
    } else {
      total += weight;
    }
  });
  return Reduce(shared, total, Sum());
}

// The sum of the weights that the filters leave, as TotalWeight. 0: nothing has a weight.
__device__ uint64_t Filter(const Draw& draw, SelectShared& shared) {
  const DrawInput& in = draw.in;
  constexpr uint64_t kLargest = uint64_t{1} << 40;
  uint64_t total = kLargest * static_cast<uint64_t>(draw.vocab);  // or less
  bool exact = false;
  const auto found = [&](uint64_t sum) {
    total = sum;
    exact = true;
  };
  if (in.top_k > 0) found(KeepTopK(draw, shared));
  if (in.typical_share != kShareOff && total > 0) found(KeepTypical(draw, shared));
  if (in.top_p_share != kShareOff && total > 0) {
    found(KeepShare(draw, ByLikelihood{draw}, in.top_p_share, total, shared));
  }
  if (in.min_p_share != kShareOff && total > 0) found(KeepAtLeast(draw, shared));
  return exact ? total : TotalWeight(draw, shared);
}

// The first ids along the order, likeliest first.
template <typename Order, typename TakesPart, typename LogprobOf>
__device__ void WriteTop(const float* values, const Draw& draw, const Order& order,
                         TakesPart takes_part, LogprobOf logprob_of, SelectShared& shared,
                         DrawOutput* out) {
  const int32_t wanted = draw.in.top_logprobs;
  const int32_t count = ListFirst(shared, values, draw.vocab, order, takes_part, wanted);
  const int32_t at = static_cast<int32_t>(threadIdx.x);
  if (at == 0) out->num_top = min(count, wanted);
  if (at >= count) return;
  const uint64_t key = shared.few_keys[at];
  const int32_t id = shared.few_ids[at];
  int32_t rank = 0;
  for (int32_t i = 0; i < count; ++i) {
    rank += IsBehind(key, id, {shared.few_keys[i], shared.few_ids[i]}) ? 1 : 0;
  }
  if (rank >= wanted) return;
  out->top[rank].token = id;
  out->top[rank].logprob = logprob_of(values[id]);
}

__device__ void DrawOne(const DrawArgs& args, int32_t index, float* values, SelectShared& shared) {
  const DrawInput& in = args.inputs[index];
  const int32_t row = in.head - args.first_head;
  const HeadStats stats = args.stats[row];
  DrawOutput* const out = &args.out[index];
  Draw draw = {in,
               args.entries + in.entries,
               args.logits + row * args.ld,
               values,
               args.vocab,
               WarpRange(args.vocab),
               0.0f,
               in.temperature > 0.0f ? 1.0f / in.temperature : 0.0f};
  LoadValues(draw, args);

  uint64_t key = 0;
  VisitLogits(values, draw.range, [&](float value, int32_t id) {
    if (!IsExcluded(value)) key = Maximum()(key, ArgMaxKey(value, id));
  });
  key = Reduce(shared, key, Maximum());
  if (key == 0) {
    if (threadIdx.x == 0) {
      out->token = -1;
      out->logprob = 0.0f;
      out->num_top = 0;
    }
    return;
  }
  int32_t token = IdOfKey(key);
  draw.max_logit = values[token];

  uint64_t total = 0;
  if (in.temperature > 0.0f) {
    total = Filter(draw, shared);
    if (total > 0) {
      const uint64_t bits = UniformBits(in.seed, in.position, in.candidate, 0);
      token = FindInIdOrder(shared, args.vocab, MulHigh64(bits, total) + 1,
                            [&](int32_t id) { return draw.Weight(values[id]); });
    }
  }

  const auto of = static_cast<DrawLogprobs>(in.logprobs);
  if (threadIdx.x == 0) {
    out->token = token;
    out->logprob =
        of == DrawLogprobs::kModel ? LogProbability(draw.raw[token], stats.max_logit, stats.total)
        : of == DrawLogprobs::kSampling && total > 0 ? LogShare(draw.Weight(values[token]), total)
                                                     : 0.0f;
    out->num_top = 0;
  }
  if (in.top_logprobs == 0) return;
  if (of == DrawLogprobs::kModel) {
    WriteTop(
        draw.raw, draw, ByModel{stats.max_logit}, [](float) { return true; },
        [&](float value) { return LogProbability(value, stats.max_logit, stats.total); }, shared,
        out);
  } else if (of == DrawLogprobs::kSampling && total > 0) {
    WriteTop(
        values, draw, ByWeight{draw}, [&](float value) { return draw.HasWeight(value); },
        [&](float value) { return LogShare(draw.Weight(value), total); }, shared, out);
  } else if (of == DrawLogprobs::kSampling && threadIdx.x == 0) {
    out->num_top = 1;  // the only token that could be drawn
    out->top[0].token = token;
    out->top[0].logprob = 0.0f;
  }
}

__global__ void __launch_bounds__(kSampleThreads) DrawKernel(const DrawArgs args) {
  __shared__ SelectShared shared;
  extern __shared__ float row[];
  WaitForPrevious();
  float* const values =
      args.scratch == nullptr ? row : args.scratch + static_cast<int64_t>(blockIdx.x) * args.vocab;
  for (int32_t n = static_cast<int32_t>(blockIdx.x); n < args.count;
       n += static_cast<int32_t>(gridDim.x)) {
    DrawOne(args, n, values, shared);
    __syncthreads();
  }
}

// A row's bytes of dynamic shared memory: more than what needs no opting in, so that Launch does,
// as the static part comes on top.
int64_t RowBytes(int64_t vocab) {
  constexpr int64_t kLeast = 48 * 1024 + 16;
  return std::max(vocab * static_cast<int64_t>(sizeof(float)), kLeast);
}

}  // namespace

bool DrawFitsShared(int64_t vocab, int64_t shared_bytes_per_block) {
  constexpr int64_t kReserved = 1024;  // the driver's, a block
  const int64_t fixed = static_cast<int64_t>(sizeof(SelectShared)) + kReserved;
  return RowBytes(vocab) + fixed <= shared_bytes_per_block;
}

cudaError_t LaunchDraw(const DrawArgs& args, const LaunchContext& context) {
  LaunchContext alone = context;
  alone.overlap = false;  // what it reads does not come from the kernel before it alone
  const size_t shared_bytes =
      args.scratch == nullptr ? static_cast<size_t>(RowBytes(args.vocab)) : 0;
  const int32_t blocks = std::min(args.count, context.num_sms);
  return Launch<DrawKernel>(alone, dim3(blocks), dim3(kSampleThreads), shared_bytes, args);
}

}  // namespace mmfree::cuda
