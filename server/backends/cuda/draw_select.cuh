// Exact selection over one row of logits by a block of kSampleThreads: where a prefix of the ids in
// some order ends. Amounts are integers, so that no order of additions shows.
//
// An order is a class of values with
//   uint32_t High(float) const   29 bits that never fall along the order; anything up to
//                                kKeyHighMax for values that take no part
//   uint32_t Low(float) const    tells those of one High apart; equal ones are in the order of ids
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DRAW_SELECT_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_DRAW_SELECT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/sample_block.cuh"

namespace mmfree::cuda {

inline constexpr int kKeyHighBits = 29;
inline constexpr uint32_t kKeyHighMax = (uint32_t{1} << kKeyHighBits) - 1;

// High and Low.
inline constexpr int kKeyBits = kKeyHighBits + 32;
template <typename Order>
__device__ __forceinline__ uint64_t KeyOf(const Order& order, float value) {
  return (static_cast<uint64_t>(order.High(value)) << 32) | order.Low(value);
}

// The last id of a prefix.
struct Cut {
  uint64_t key;
  int32_t id;
};
__device__ __forceinline__ bool IsBehind(uint64_t key, int32_t id, const Cut& cut) {
  return key != cut.key ? key > cut.key : id > cut.id;
}
template <typename Order>
__device__ __forceinline__ bool IsBehind(const Order& order, float value, int32_t id,
                                         const Cut& cut) {
  const uint32_t high = order.High(value);
  const uint32_t cut_high = static_cast<uint32_t>(cut.key >> 32);
  if (high != cut_high) return high > cut_high;
  return IsBehind(KeyOf(order, value), id, cut);
}

// Shared memory of the selection.
struct SelectShared {
  static constexpr int kDigitBits = 11;
  static constexpr int kBins = 1 << kDigitBits;
  static constexpr int kFew = 512;

  uint64_t warps[kSampleWarps];
  uint32_t bins[kBins];
  uint32_t high_bins[kBins];  // the upper words of exact amounts
  // Ids that are looked at one by one.
  uint64_t few_keys[kFew];
  uint64_t few_amounts[kFew];
  int32_t few_ids[kFew];
  int32_t num_few;
  // What one thread found for all.
  uint64_t before;
  uint64_t key;
  int32_t id;
  int32_t first_bin;
  int32_t last_bin;
};

// Every function is called by all threads of the block and begins with a barrier where it writes
// shared memory that an earlier call read.

template <typename Op>
__device__ __forceinline__ uint64_t Reduce(SelectShared& shared, uint64_t value, Op op) {
  __syncthreads();
  return BlockReduce(value, shared.warps, op);
}

// As the functions of sample_block.cuh.
__device__ __forceinline__ uint64_t RunningSum(SelectShared& shared, uint64_t value,
                                               uint64_t* total) {
  return RunningSum(shared.warps, value, total);
}
template <typename AmountOf>
__device__ __forceinline__ int32_t FindInIdOrder(SelectShared& shared, int32_t vocab,
                                                 uint64_t target, AmountOf amount_of) {
  return FindInIdOrder(shared.warps, &shared.id, vocab, target, amount_of);
}

__device__ __forceinline__ void ClearBins(SelectShared& shared) {
  __syncthreads();
  for (int i = threadIdx.x; i < SelectShared::kBins; i += kSampleThreads) {
    shared.bins[i] = 0;
    shared.high_bins[i] = 0;
  }
  if (threadIdx.x == 0) shared.num_few = 0;
  __syncthreads();
}

// The cut, when the prefix ends `target` (not 0) into the amounts of the first `count` ids listed
// in shared.few_*.
__device__ Cut RankFew(SelectShared& shared, int32_t count, uint64_t target) {
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) < count) {
    const Cut self = {shared.few_keys[threadIdx.x], shared.few_ids[threadIdx.x]};
    uint64_t before = 0;
    for (int32_t i = 0; i < count; ++i) {
      if (IsBehind(self.key, self.id, {shared.few_keys[i], shared.few_ids[i]})) {
        before += shared.few_amounts[i];
      }
    }
    if (before < target && target <= before + shared.few_amounts[threadIdx.x]) {
      shared.key = self.key;
      shared.id = self.id;
    }
  }
  __syncthreads();
  return {shared.key, shared.id};
}

// As SelectPrefix, whatever the amounts are: digit by digit of the keys, with exact sums.
template <typename Order, typename AmountOf>
__device__ Cut SelectByDigits(SelectShared& shared, const float* values, int32_t vocab,
                              const Order& order, AmountOf amount_of, uint64_t target) {
  using S = SelectShared;
  const IdRange range = WarpRange(vocab);
  const int thread = threadIdx.x;
  uint64_t prefix = 0;  // the bits of the cut's key that are known: those from known_from on
  for (int known_from = kKeyBits; known_from > 0;) {
    const int shift = max(known_from - S::kDigitBits, 0);
    const uint32_t digits = (uint32_t{1} << (known_from - shift)) - 1;
    ClearBins(shared);
    VisitLogits(values, range, [&](float value, int32_t) {
      const uint64_t key = KeyOf(order, value);
      if ((key >> known_from) != prefix) return;
      const uint64_t amount = amount_of(value);
      const uint32_t bin = static_cast<uint32_t>(key >> shift) & digits;
      const uint32_t low = static_cast<uint32_t>(amount);
      const uint32_t old = atomicAdd(&shared.bins[bin], low);
      const uint32_t high = static_cast<uint32_t>(amount >> 32) + (old + low < old ? 1u : 0u);
      if (high != 0) atomicAdd(&shared.high_bins[bin], high);
    });
    __syncthreads();
    const auto amount_in = [&](int bin) {
      return (static_cast<uint64_t>(shared.high_bins[bin]) << 32) | shared.bins[bin];
    };
    const uint64_t first = amount_in(2 * thread);
    const uint64_t both = first + amount_in(2 * thread + 1);
    uint64_t total = 0;
    const uint64_t up_to = RunningSum(shared, both, &total);
    if (up_to - both < target && target <= up_to) {
      const bool in_first = target <= up_to - both + first;
      shared.id = 2 * thread + (in_first ? 0 : 1);
      shared.before = up_to - both + (in_first ? 0 : first);
    }
    __syncthreads();
    target -= shared.before;
    prefix = (prefix << (known_from - shift)) | static_cast<uint64_t>(shared.id);
    known_from = shift;
  }
  // All keys there are equal.
  const auto amount_at = [&](float value) {
    return KeyOf(order, value) == prefix ? amount_of(value) : uint64_t{0};
  };
  uint64_t sum = 0;
  VisitLogits(values, range, [&](float value, int32_t) { sum += amount_at(value); });
  Reduce(shared, sum, Sum());
  return {prefix,
          FindInIdOrder(shared, vocab, target, [&](int32_t id) { return amount_at(values[id]); })};
}

// A part of the values of High, in SelectShared::kBins bins of equal width.
struct Bins {
  uint32_t base;
  int shift;

  // kBins or more: outside.
  __device__ __forceinline__ uint32_t Of(uint32_t high) const {
    return high < base ? ~0u : (high - base) >> shift;
  }
};
__device__ __forceinline__ Bins AllBins() { return {0, kKeyHighBits - SelectShared::kDigitBits}; }

// Adds up the amounts of each bin into shared.bins, in units of 2^scale and rounded down, which is
// what makes it quick; the sums have to fit. Returns the exact sum over all bins.
template <typename Order, typename AmountOf>
__device__ uint64_t CountBins(SelectShared& shared, const float* values, int32_t vocab,
                              const Order& order, const Bins& bins, AmountOf amount_of, int scale) {
  ClearBins(shared);
  uint64_t total = 0;
  VisitLogits(values, WarpRange(vocab), [&](float value, int32_t) {
    const uint32_t bin = bins.Of(order.High(value));
    if (bin >= SelectShared::kBins) return;
    const uint64_t amount = amount_of(value);
    total += amount;
    const uint32_t units = static_cast<uint32_t>(amount >> scale);
    if (units != 0) atomicAdd(&shared.bins[bin], units);
  });
  return Reduce(shared, total, Sum());
}

// Finds the bins [shared.first_bin, shared.last_bin] that the prefix ends in, at most, where the
// amounts of the bins together are `total` and those of the prefix among them `target` or more.
__device__ void LocateBins(SelectShared& shared, int scale, uint64_t target, uint64_t total) {
  if (threadIdx.x == 0) shared.first_bin = shared.last_bin = SelectShared::kBins - 1;
  const int bin = 2 * threadIdx.x;
  const uint64_t first = shared.bins[bin];
  const uint64_t both = first + shared.bins[bin + 1];
  uint64_t units = 0;
  const uint64_t before = RunningSum(shared, both, &units) - both;
  // The bin in which the sums reach the target, when each may be this much more.
  const auto find = [&](uint64_t more, int32_t* found) {
    const auto reaches = [&](uint64_t sum) { return (sum << scale) + more >= target; };
    if (bin > 0 && reaches(before)) return;
    if (reaches(before + first)) {
      *found = bin;
    } else if (reaches(before + both)) {
      *found = bin + 1;
    }
  };
  find(0, &shared.last_bin);
  find(total - (units << scale), &shared.first_bin);  // what the rounding took, all told
  __syncthreads();
}

// The thread's sums.
struct BinSums {
  uint64_t before = 0;
  uint64_t inside = 0;
};
// Lists the ids of the bins [first_bin, last_bin] in shared.few_*, as long as there is room. Sums
// the amounts of the bins before them and of themselves. Calls behind(id) for ids of later bins.
template <typename Order, typename AmountOf, typename Behind>
__device__ BinSums ListFew(SelectShared& shared, const float* values, int32_t vocab,
                           const Order& order, const Bins& bins, AmountOf amount_of,
                           uint32_t first_bin, uint32_t last_bin, Behind behind) {
  BinSums sums;
  VisitLogits(values, WarpRange(vocab), [&](float value, int32_t id) {
    const uint32_t high = order.High(value);
    if (high < bins.base) return;
    const uint32_t bin = bins.Of(high);
    if (bin > last_bin) {
      behind(id);
      return;
    }
    const uint64_t amount = amount_of(value);
    if (amount == 0) return;
    if (bin < first_bin) {
      sums.before += amount;
      return;
    }
    sums.inside += amount;
    const int32_t at = atomicAdd(&shared.num_few, 1);
    if (at >= SelectShared::kFew) return;
    shared.few_keys[at] = KeyOf(order, value);
    shared.few_amounts[at] = amount;
    shared.few_ids[at] = id;
  });
  return sums;
}

// The largest shift with which sums of amounts fit 31 bits, when they come to `total` at most.
__device__ __forceinline__ int ScaleOf(uint64_t total) {
  return max(33 - __clzll(static_cast<long long>(total)), 0);
}

// Finds where the shortest prefix ends whose amounts reach target_of(sum of all amounts), and calls
// drop(id) for what is behind it, of each id that the thread visits and of others; for ids that
// take no part, perhaps. Nothing is dropped, and all of it is the prefix, where the target is
// beyond the sum. Returns the sum over the prefix and leaves those of the warps' ranges in
// shared.warps.
//   amount_of(value) -> uint64_t, 0 for those that take no part; after drop(id), too
//   most: at least the sum of the amounts
template <typename Order, typename AmountOf, typename TargetOf, typename Drop>
__device__ uint64_t KeepPrefix(SelectShared& shared, const float* values, int32_t vocab,
                               const Order& order, AmountOf amount_of, uint64_t most,
                               TargetOf target_of, Drop drop) {
  int scale = ScaleOf(most);
  Bins bins = AllBins();
  uint64_t target = 0;     // not 0 after the first round
  uint64_t of_thread = 0;  // the amounts of what is before the bins
  uint64_t before = 0;     // the same, of all threads
  for (bool narrower = true; narrower;) {
    const uint64_t total = CountBins(shared, values, vocab, order, bins, amount_of, scale);
    if (target == 0) {
      target = max(target_of(total), uint64_t{1});
      if (total < target) return total;
    }
    LocateBins(shared, scale, target - before, total);
    const uint32_t first_bin = static_cast<uint32_t>(shared.first_bin);
    const uint32_t last_bin = static_cast<uint32_t>(shared.last_bin);
    const BinSums sums =
        ListFew(shared, values, vocab, order, bins, amount_of, first_bin, last_bin, drop);
    of_thread += sums.before;
    before = Reduce(shared, of_thread, Sum());
    const int32_t count = shared.num_few;
    if (count <= SelectShared::kFew) {
      const Cut cut = RankFew(shared, count, target - before);
      const int32_t at = static_cast<int32_t>(threadIdx.x);
      if (at < count) {
        const int32_t id = shared.few_ids[at];
        if (IsBehind(shared.few_keys[at], id, cut)) {
          drop(id);
        } else {
          atomicAdd(reinterpret_cast<unsigned long long*>(&shared.warps[WarpOf(id, vocab)]),
                    static_cast<unsigned long long>(shared.few_amounts[at]));
        }
      }
      __syncthreads();
      return WarpReduce(shared.warps[threadIdx.x % 32], Sum());
    }
    // The same again over those bins, as long as that tells more of them apart.
    const uint32_t width = (last_bin + 1 - first_bin) << bins.shift;
    const Bins next = {bins.base + (first_bin << bins.shift),
                       max(32 - SelectShared::kDigitBits - __clz(static_cast<int>(width - 1)), 0)};
    const int next_scale = min(scale, ScaleOf(Reduce(shared, sums.inside, Sum())));
    narrower = next.shift < bins.shift || next_scale < scale;
    bins = next;
    scale = next_scale;
  }
  const Cut cut = SelectByDigits(shared, values, vocab, order, amount_of, target);
  uint64_t kept = 0;
  VisitLogits(values, WarpRange(vocab), [&](float value, int32_t id) {
    if (IsBehind(order, value, id, cut)) {
      drop(id);
    } else {
      kept += amount_of(value);
    }
  });
  return Reduce(shared, kept, Sum());
}

// Lists the first `count` ids along the order in shared.few_*, or all that take part: among others
// and in no particular order. Returns the length of the list. `count` is far below kFew.
//   takes_part(value) -> bool
template <typename Order, typename TakesPart>
__device__ int32_t ListFirst(SelectShared& shared, const float* values, int32_t vocab,
                             const Order& order, TakesPart takes_part, int32_t count) {
  const auto one = [&](float value) { return takes_part(value) ? uint64_t{1} : uint64_t{0}; };
  const uint64_t wanted = static_cast<uint64_t>(count);
  const uint64_t total = CountBins(shared, values, vocab, order, AllBins(), one, 0);
  LocateBins(shared, 0, wanted, total);
  ListFew(shared, values, vocab, order, AllBins(), one, 0, static_cast<uint32_t>(shared.last_bin),
          [](int32_t) {});
  __syncthreads();
  if (shared.num_few <= SelectShared::kFew) return shared.num_few;
  const Cut cut = SelectByDigits(shared, values, vocab, order, one, wanted);
  ClearBins(shared);
  VisitLogits(values, WarpRange(vocab), [&](float value, int32_t id) {
    if (!takes_part(value) || IsBehind(order, value, id, cut)) return;
    const int32_t at = atomicAdd(&shared.num_few, 1);
    shared.few_keys[at] = KeyOf(order, value);
    shared.few_ids[at] = id;
  });
  __syncthreads();
  return shared.num_few;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DRAW_SELECT_CUH_
