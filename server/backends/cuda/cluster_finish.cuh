// What follows the products in the cluster kernel: the recurrence, SwiGLU, the residual stream, and
// the sums and maxima that the next stage's norm needs.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_FINISH_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_FINISH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/cluster_step.cuh"

namespace mmfree::cuda {

// A column of the next stage's norm: keeps y, and the largest |t| of this thread.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Put(const ClusterStage& next, int own,
                                                                float y, const float* w2,
                                                                uint32_t (&max_bits)[3]) {
  const int row = threadIdx.x / kRowThreads;
  const int own_columns = next.column_groups * kClusterLanes;
  At<float>(args_.shared.values)[row * own_columns + own] = y;
  max_bits[0] = max(max_bits[0], AbsBits(y * w2[own]));
  if (next.outputs == 3) {
    max_bits[1] = max(max_bits[1], AbsBits(y * w2[own + own_columns]));
    max_bits[2] = max(max_bits[2], AbsBits(y * w2[own + 2 * own_columns]));
  }
}

// A warp, which is of one row: its maxima into the block's.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::PutMax(const ClusterStage& next,
                                                                   const uint32_t (&max_bits)[3]) {
  const int row = threadIdx.x / kRowThreads;
  const bool leads = threadIdx.x % 32 == 0;
  const uint32_t first = __reduce_max_sync(0xffffffffu, max_bits[0]);
  if (leads) atomicMax(&block_.max_bits[row][0], first);
  if (next.outputs == 3) {
    const uint32_t second = __reduce_max_sync(0xffffffffu, max_bits[1]);
    const uint32_t third = __reduce_max_sync(0xffffffffu, max_bits[2]);
    if (leads) {
      atomicMax(&block_.max_bits[row][1], second);
      atomicMax(&block_.max_bits[row][2], third);
    }
  }
}

// Takes in rows of the step from `first_row` on.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Begin(int first_row, int num_rows,
                                                                  int layer) {
  const int row = threadIdx.x / kRowThreads;
  const ClusterStage& next = block_.stages[kRecurrenceStage];
  const int lane = threadIdx.x % kClusterLanes;
  const int own_dim = OwnColumns(args_.dim);
  step_row_ = first_row + row;
  exists_ = step_row_ < num_rows;
  rows_ = min(kRows, num_rows - first_row);
  slot_ = exists_ ? args_.inputs[step_row_].slot : 0;
  BarrierWait(SharedAddress(&block_.norms), layer % 2);
  const float* const w1 = Vectors(layer) + VectorAt(kAttnNorm, args_.dim);
  const float* const w2 = Vectors(layer) + next.norm_at;
  uint32_t max_bits[3] = {};
#pragma unroll 1
  for (int j = threadIdx.x % kRowThreads / kClusterLanes; j < args_.dim / kNormLanes;
       j += kGroupStep) {
    const int own = j * kClusterLanes + lane;
    float x = 0.0f;
    if (exists_) {
      x = __ldcg(args_.h + step_row_ * args_.ld_h + j * kNormLanes + rank_ * kClusterLanes + lane);
    }
    At<float>(args_.shared.hidden)[row * own_dim + own] = x;
    Put(next, own, x * w1[own], w2, max_bits);
  }
  PutMax(next, max_bits);
}

// The block's sum for a slot of a tile and this thread's row; leaves zero.
template <int kRows, int kDepth>
__device__ __forceinline__ int32_t ClusterStep<kRows, kDepth>::TakeSum(int tile, int slot) const {
  int32_t* const sum = At<int32_t>(args_.shared.sums) + (tile * kTileRows + slot) * kSumStride +
                       threadIdx.x / kRowThreads;
  const int32_t value = *sum;
  *sum = 0;
  return value;
}

// A sum as the product's output; that of a tile's second slots came times four.
template <int kRows, int kDepth>
__device__ __forceinline__ float ClusterStep<kRows, kDepth>::Value(int32_t sum, int output,
                                                                   float weight_scale) const {
  const int row = threadIdx.x / kRowThreads;
  return static_cast<float>(sum - block_.code_sums[row][output]) *
         (block_.out_scales[row][output] * weight_scale);
}

// Begins to read the first of the states that this thread will advance.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::ReadState(int model_layer) {
  const int j = threadIdx.x % kRowThreads / kClusterLanes;
  if (!exists_ || j * kNormLanes >= args_.dim) return;
  state_ = __ldcg(args_.states + slot_ * args_.state_stride + model_layer * args_.dim +
                  j * kNormLanes + rank_ * kClusterLanes + threadIdx.x % kClusterLanes);
}

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::FinishRecurrence(
    const ClusterStage& next, int layer, int model_layer) {
  const int row = threadIdx.x / kRowThreads;
  const int lane = threadIdx.x % kClusterLanes;
  const int groups = args_.dim / kNormLanes;
  const int own_dim = OwnColumns(args_.dim);
  const int tile_slot = lane / 2 + lane % 2 * 8;
  const int shift = lane % 2 * 2;
  const float* const vectors = Vectors(layer);
  const float* const w2 = vectors + next.norm_at;
  float* const states = args_.states + slot_ * args_.state_stride + model_layer * args_.dim +
                        rank_ * kClusterLanes + lane;
  uint32_t max_bits[3] = {};
#pragma unroll 1
  for (int j = threadIdx.x % kRowThreads / kClusterLanes; j < groups; j += kGroupStep) {
    const int own = j * kClusterLanes + lane;
    float state = state_;
    if (j >= kGroupStep) state = exists_ ? __ldcg(states + j * kNormLanes) : 0.0f;
    float v[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      v[m] = Value(TakeSum(m * groups + j, tile_slot) >> shift, m, WeightScale(m, layer));
    }
    // Recur and GateOutput of numerics.h, the two gates' divisions side by side.
    float gates[2] = {1.0f, v[0]};
    const float divisors[2] = {1.0f + Exp(-v[1]), 1.0f + Exp(-v[0])};
    DivideBatch(gates, divisors, gates);
    const float bound = vectors[VectorAt(kLowerBound, args_.dim) + own];
    const float forget = fmaf(1.0f - bound, gates[0], bound);
    const float after[1] = {fmaf(forget, state, gates[1] * (1.0f - forget))};
    float silu[1];
    SiluBatch(after, silu);
    if (exists_) states[j * kNormLanes] = after[0];
    At<float>(args_.shared.gates)[row * own_dim + own] = v[2];
    Put(next, own, (v[2] * vectors[VectorAt(kGNorm, args_.dim) + own]) * silu[0], w2, max_bits);
  }
  PutMax(next, max_bits);
}

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::FinishGate(const ClusterStage& next,
                                                                       int layer) {
  const int lane = threadIdx.x % kClusterLanes;
  const float* const w2 = Vectors(layer) + next.norm_at;
  const float weight_scale = WeightScale(2 + kGateStage, layer);
  uint32_t max_bits[3] = {};
#pragma unroll 1
  for (int j = threadIdx.x % kRowThreads / kClusterLanes; j < next.column_groups; j += kGroupStep) {
    const int tile = 2 * j + lane / 8;
    const int32_t first = TakeSum(tile, lane % 8);
    const int32_t second = TakeSum(tile, lane % 8 + 8);
    float p[1] = {Value(first, 0, weight_scale)};
    SiluBatch(p, p);
    Put(next, j * kClusterLanes + lane, p[0] * Value(second >> 2, 0, weight_scale), w2, max_bits);
  }
  PutMax(next, max_bits);
}

// `index`: kOutputStage or kDownStage. `last`: the result is the step's.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::FinishResidual(const ClusterStage& next,
                                                                           int index, int layer,
                                                                           bool last) {
  const int row = threadIdx.x / kRowThreads;
  const int lane = threadIdx.x % kClusterLanes;
  const int own_dim = OwnColumns(args_.dim);
  const int tile_slot = lane / 2 + lane % 2 * 8;
  const int shift = lane % 2 * 2;
  const float factor = block_.out_scales[row][0] * WeightScale(2 + index, layer);
  const int32_t code_sum = block_.code_sums[row][0];
  const bool to_next_layer = index == kDownStage && !last;
  if (to_next_layer) BarrierWait(SharedAddress(&block_.norms), (layer + 1) % 2);
  const float* const vectors = Vectors(to_next_layer ? layer + 1 : layer);
  const float* const w1 = vectors + VectorAt(index == kDownStage ? kAttnNorm : kMlpNorm, args_.dim);
  const float* const w2 = vectors + next.norm_at;
  uint32_t max_bits[3] = {};
#pragma unroll 1
  for (int j = threadIdx.x % kRowThreads / kClusterLanes; j < args_.dim / kNormLanes;
       j += kGroupStep) {
    const int own = j * kClusterLanes + lane;
    const float value = static_cast<float>((TakeSum(j, tile_slot) >> shift) - code_sum);
    float* const hidden = At<float>(args_.shared.hidden) + row * own_dim + own;
    const float x = fmaf(value, factor, *hidden);
    if (index == kDownStage && last) {
      if (exists_) {
        args_.h[step_row_ * args_.ld_h + j * kNormLanes + rank_ * kClusterLanes + lane] = x;
      }
      continue;
    }
    *hidden = x;
    Put(next, own, x * w1[own], w2, max_bits);
  }
  if (index != kDownStage || !last) PutMax(next, max_bits);
}

// The ordered sums of a stage's norm over the block's columns (strides 1 to 8 of the contract's
// tree) and the maxima, which every block gets.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::SendStats(const ClusterStage& stage) {
  if (threadIdx.x >= kRows * kClusterLanes) return;
  const int row = threadIdx.x / kClusterLanes;
  const int lane = threadIdx.x % kClusterLanes;
  const int own_columns = stage.column_groups * kClusterLanes;
  const float* const inputs = At<float>(stage.inputs_at) + row * own_columns;
  const float* const values = At<float>(args_.shared.values) + row * own_columns;
  float xx = 0.0f;
  float yy = 0.0f;
#pragma unroll 4
  for (int own = lane; own < own_columns; own += kClusterLanes) {
    const float x = inputs[own];
    const float y = values[own];
    xx = fmaf(x, x, xx);
    yy = fmaf(y, y, yy);
  }
  const uint4 max_bits = *reinterpret_cast<const uint4*>(block_.max_bits[row]);
#pragma unroll
  for (int stride = 1; stride < kClusterLanes; stride *= 2) {
    xx += __shfl_xor_sync(0xffffffffu, xx, stride);
    yy += __shfl_xor_sync(0xffffffffu, yy, stride);
  }
  __syncwarp();
  if (lane == 0) *reinterpret_cast<uint4*>(block_.max_bits[row]) = make_uint4(0, 0, 0, 0);
  // Each of a row's lanes sends to one block.
  const uint32_t to =
      InBlock(SharedAddress(At<NormStats>(args_.shared.stats) + rank_ * kRows + row), lane);
  const uint32_t barrier = InBlock(SharedAddress(&block_.stats), lane);
  Send16(to, make_uint4(FloatToBits(xx), FloatToBits(yy), max_bits.x, max_bits.y), barrier);
  if (stage.outputs == 3) Send16(to + 16, make_uint4(max_bits.z, 0, 0, 0), barrier);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_FINISH_CUH_
