// One block's part of a decode step in the cluster kernel (decode_cluster.cu): norms, codes and
// products. cluster_finish.cuh has what follows the products.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_STEP_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_STEP_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/cluster_block.cuh"
#include "server/backends/cuda/cluster_exchange.cuh"
#include "server/backends/cuda/cluster_layout.h"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/weight_ring.cuh"

namespace mmfree::cuda {

// The sums and the largest |t| of a row's norm.
struct RowNorm {
  float xx = 0.0f;
  float yy = 0.0f;
  float max_abs = 0.0f;
};

// kRows rows at a time, of at most eight; a ring of kDepth units for each warp.
template <int kRows, int kDepth>
class ClusterStep {
 public:
  using Block = ClusterBlock<kRows>;

  __device__ __forceinline__ ClusterStep(const ClusterDecodeArgs& args, uint8_t* shared,
                                         Block& block, int passes)
      : args_(args),
        shared_(shared),
        block_(block),
        rank_(static_cast<int>(ClusterRank())),
        total_layers_(passes * args.weights.layers),
        ring_(args.weights, passes,
              reinterpret_cast<UnitRun*>(shared + args.shared.runs) +
                  threadIdx.x / 32 * args.shared.runs_per_warp,
              shared + args.shared.ring + threadIdx.x / 32 * kDepth * Ring::kUnitBytes) {}

  // Rows [first_row + n * row_step, ... + kRows) of `num_rows` for each pass n.
  __device__ __forceinline__ void Run(int first_row, int row_step, int num_rows);

 private:
  using Ring = WeightRing<kDepth, kUnitPieces>;
  static_assert(kRows <= 8 && 8 % kRows == 0);
  static constexpr int kSumStride = kRows + 1;
  // Threads that finish a row: 16 columns of each of so many column groups at a time.
  static constexpr int kRowThreads = kClusterThreads / kRows;
  static constexpr int kGroupStep = kRowThreads / kClusterLanes;

  template <typename T>
  __device__ __forceinline__ T* At(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }
  // The vectors of the present layer, or of the one after it.
  __device__ __forceinline__ const float* Vectors(int layer) const {
    return At<float>(args_.shared.norms) + layer % 2 * args_.norm_floats;
  }
  // What this block sends, in the place where the others receive it.
  __device__ __forceinline__ uint8_t* OwnCodes(const ClusterStage& stage) const {
    return shared_ + args_.shared.codes + rank_ * stage.sent_bytes;
  }
  __device__ __forceinline__ float WeightScale(int index, int layer) const {
    return Vectors(layer)[ScalesAt(args_.dim, args_.channels) + index];
  }

  // cluster_step.cuh
  __device__ __forceinline__ void CopyNorms(int layer);
  __device__ __forceinline__ void Split();
  // One warp, of which lane 4 n + o has row n and output o:
  __device__ __forceinline__ RowNorm TakeStats(const ClusterStage& stage) const;
  __device__ __forceinline__ void MakeCodeScale(const ClusterStage& stage, const RowNorm& norm);
  __device__ __forceinline__ void MakeOutScale(const ClusterStage& stage, const RowNorm& norm);
  __device__ __forceinline__ bool HasScale(const ClusterStage& stage) const {
    return static_cast<int>(threadIdx.x % 32 / 4) < rows_ &&
           static_cast<int>(threadIdx.x % 4) < stage.outputs;
  }
  __device__ __forceinline__ void Quantize(const ClusterStage& stage, int layer);
  __device__ __forceinline__ void SendCodes(const ClusterStage& stage) const;
  __device__ __forceinline__ void AddCodeSums(const ClusterStage& stage);
  __device__ __forceinline__ void Flush(int32_t (&acc)[2][4], int tile);
  __device__ __forceinline__ void Multiply(const ClusterStage& stage, const ClusterShare& share);

  // cluster_finish.cuh
  __device__ __forceinline__ void Begin(int first_row, int num_rows, int layer);
  __device__ __forceinline__ int32_t TakeSum(int tile, int slot) const;
  __device__ __forceinline__ float Value(int32_t sum, int output, float factor) const;
  __device__ __forceinline__ void Put(const ClusterStage& next, int own, float y, const float* w2,
                                      uint32_t (&max_bits)[3]);
  __device__ __forceinline__ void PutMax(const ClusterStage& next, const uint32_t (&max_bits)[3]);
  __device__ __forceinline__ void ReadState(int model_layer);
  __device__ __forceinline__ void FinishRecurrence(const ClusterStage& next, int layer,
                                                   int model_layer);
  __device__ __forceinline__ void FinishGate(const ClusterStage& next, int layer);
  __device__ __forceinline__ void FinishResidual(const ClusterStage& next, int index, int layer,
                                                 bool last);
  __device__ __forceinline__ void SendStats(const ClusterStage& stage);

  __device__ __forceinline__ void RunStage(int index, int layer, int model_layer);

  const ClusterDecodeArgs& args_;
  uint8_t* const shared_;
  Block& block_;
  const int rank_;
  const int total_layers_;
  Ring ring_;
  uint32_t parity_ = 0;  // of the present stage's exchanges
  int rows_ = 0;         // that there are
  // Of the row that this thread finishes, threadIdx.x / kRowThreads if there is one:
  int step_row_ = 0;  // in the step
  bool exists_ = false;
  int32_t slot_ = 0;
  float state_ = 0.0f;  // of the first column, read ahead
};

// One thread: a layer's vectors into shared memory.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::CopyNorms(int layer) {
  if (layer >= total_layers_) return;
  const uint32_t bytes = args_.norm_floats * 4;
  const int model_layer = layer % args_.weights.layers;
  BarrierArriveExpect(SharedAddress(&block_.norms), bytes);
  BulkCopy(SharedAddress(Vectors(layer)),
           args_.norms + (int64_t{model_layer} * kClusterBlocks + rank_) * args_.norm_floats, bytes,
           SharedAddress(&block_.norms));
}

// Who multiplies what: the same in every layer.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Split() {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int index = 0; index < kClusterStages; ++index) {
    const DeviceMatrix& matrix = args_.stages[index];
    const int groups = matrix.k_blocks / kUnitPieces;
    const int units = TilesOfBlock(args_.dim, args_.channels, index) * groups;
    const int first = units * warp / kClusterWarps;
    const int end = units * (warp + 1) / kClusterWarps;
    const uint32_t weights_at = static_cast<uint32_t>((matrix.codes - args_.weights.first) / 16);
    if (first < end) {
      ring_.List((end - 1) / groups - first / groups + 1, [&](int n) {
        const int tile = first / groups + n;
        const int group = n == 0 ? first % groups : 0;
        const int row_tile = RowTileOf(args_, index, tile, rank_);
        const uint32_t block =
            static_cast<uint32_t>(row_tile / 4 * matrix.k_blocks + group * kUnitPieces);
        return UnitRun{weights_at + block * (kBlockBytes / 16) + row_tile % 4 * 32,
                       min(groups, end - tile * groups) - group};
      });
    }
    if (threadIdx.x % 32 == 0) {
      block_.shares[index][warp] = {first / groups, first % groups, end - first};
      if (warp == 0) block_.stages[index] = MakeClusterStage<kRows>(args_, index);
    }
  }
  ring_.EndLayer();
}

template <int kRows, int kDepth>
__device__ __forceinline__ RowNorm
ClusterStep<kRows, kDepth>::TakeStats(const ClusterStage& stage) const {
  RowNorm norm;
  if (!HasScale(stage)) return norm;
  const NormStats* const stats = At<NormStats>(args_.shared.stats) + threadIdx.x % 32 / 4;
  float xx[kClusterBlocks];
  float yy[kClusterBlocks];
  uint32_t max_bits = 0;
#pragma unroll
  for (int block = 0; block < kClusterBlocks; ++block) {
    const float2 sums = *reinterpret_cast<const float2*>(stats + block * kRows);
    xx[block] = sums.x;
    yy[block] = sums.y;
    max_bits = max(max_bits, stats[block * kRows].max_bits[threadIdx.x % 4]);
  }
  // Strides 16 to 128 of the contract's tree.
#pragma unroll
  for (int step = 1; step < kClusterBlocks; step *= 2) {
#pragma unroll
    for (int block = 0; block < kClusterBlocks; block += 2 * step) {
      xx[block] += xx[block + step];
      yy[block] += yy[block + step];
    }
  }
  norm.xx = xx[0];
  norm.yy = yy[0];
  norm.max_abs = BitsToFloat(max_bits);
  return norm;
}

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::MakeCodeScale(const ClusterStage& stage,
                                                                          const RowNorm& norm) {
  if (!HasScale(stage)) return;
  const float size = static_cast<float>(stage.column_groups * kNormLanes);
  const CodeScale scale =
      stage.two_norms ? CodeScaleFrom<false>(norm.xx, norm.yy, norm.max_abs, size, args_.eps)
                      : CodeScaleFrom<true>(norm.xx, norm.yy, norm.max_abs, size, args_.eps);
  block_.code_scales[threadIdx.x % 32 / 4][threadIdx.x % 4] = scale.scale;
}

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::MakeOutScale(const ClusterStage& stage,
                                                                         const RowNorm& norm) {
  if (!HasScale(stage)) return;
  const float size = static_cast<float>(stage.column_groups * kNormLanes);
  float factor = RmsFactor(norm.xx, size, args_.eps);
  if (stage.two_norms) factor = StackedRmsFactor(factor, norm.yy, size, args_.eps);
  block_.out_scales[threadIdx.x % 32 / 4][threadIdx.x % 4] =
      ScaleFromFactor(factor, norm.max_abs).out;
}

// The codes of the block's columns, and their sums. A thread makes four at a time.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Quantize(const ClusterStage& stage,
                                                                     int layer) {
  constexpr int kQuads = kClusterLanes / 4;
  uint8_t* const sent = OwnCodes(stage);
  const int groups = stage.column_groups;
  const float* const w2 = Vectors(layer) + stage.norm_at;
  const float* const values = At<float>(args_.shared.values);
  const int row = threadIdx.x / kQuads % kRows;
  const int in_group = threadIdx.x % kQuads * 4;
  const int all_quads = stage.codes_bytes / 4;
#pragma unroll 1
  for (int first = 0; first < all_quads; first += kClusterThreads) {
    const int quad = first + threadIdx.x;
    if (quad - static_cast<int>(threadIdx.x % 32) >= all_quads) break;  // the same in a warp
    const int w_group = quad / (kQuads * kRows);
    int32_t sum = 0;
    int output = 0;
    if (quad < all_quads) {
      output = (w_group >= groups) + (w_group >= 2 * groups);
      const int own = (w_group - output * groups) * kClusterLanes + in_group;
      const float4 y =
          *reinterpret_cast<const float4*>(values + row * groups * kClusterLanes + own);
      const float4 w = *reinterpret_cast<const float4*>(w2 + w_group * kClusterLanes + in_group);
      const uint32_t codes = QuantizeQuad<false>(y, w, block_.code_scales[row][output], &sum);
      *reinterpret_cast<uint32_t*>(sent + 4 * quad) = codes;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (quad < all_quads && threadIdx.x % kQuads == 0) {
      atomicAdd(reinterpret_cast<int32_t*>(sent + stage.codes_bytes) + 4 * row + output, sum);
    }
  }
}

// Sends the other blocks the codes and their sums, a warp to each.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::SendCodes(
    const ClusterStage& stage) const {
  const int block = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0 || block == rank_) return;
  const uint32_t codes = SharedAddress(OwnCodes(stage));
  SendBulk(InBlock(codes, block), codes, stage.sent_bytes,
           InBlock(SharedAddress(&block_.codes), block));
}

// The sums of the rows' codes over all blocks, by one warp for each row: where the units do not
// divide evenly, those that have fewer to multiply.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::AddCodeSums(const ClusterStage& stage) {
  constexpr int kEvery = kClusterWarps / kRows;
  const int warp = threadIdx.x / 32;
  if (warp % kEvery != 0) return;
  const int row = warp / kEvery;
  const int block = threadIdx.x % kClusterBlocks;
  int4 sums = *reinterpret_cast<const int4*>(
      shared_ + args_.shared.codes + block * stage.sent_bytes + stage.codes_bytes + row * 16);
#pragma unroll
  for (int step = 1; step < kClusterBlocks; step *= 2) {
    sums.x += __shfl_xor_sync(0xffffffffu, sums.x, step);
    if (stage.outputs == 3) {
      sums.y += __shfl_xor_sync(0xffffffffu, sums.y, step);
      sums.z += __shfl_xor_sync(0xffffffffu, sums.z, step);
    }
  }
  if (threadIdx.x % 32 == 0) *reinterpret_cast<int4*>(block_.code_sums[row]) = sums;
}

// Adds the sums of one tile to the block's.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Flush(int32_t (&acc)[2][4], int tile) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 4 * 2;
  if (row < kRows) {
    int32_t* const sums =
        At<int32_t>(args_.shared.sums) + (tile * kTileRows + lane / 4) * kSumStride + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // The second chain's codes came times 16.
      atomicAdd(&sums[i / 2 * 8 * kSumStride + i % 2], acc[0][i] + (acc[1][i] >> 4));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[0][i] = acc[1][i] = 0;
}

// A warp's share of a stage's products.
//
// Of a word of codes (layout.h) two bits in four are columns 16 before those of the others. Two
// words make two A fragments: one of the columns that come first in each, one of the others, whose
// codes, and sums, are 16 times as large. So no word is shifted, integer instructions being what
// bounds this loop.
template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Multiply(const ClusterStage& stage,
                                                                     const ClusterShare& share) {
  constexpr uint32_t kGroupBytes = kRows * kClusterLanes;
  const int lane = threadIdx.x % 32;
  const int groups = stage.column_groups;
  // Tiles of each of the stage's outputs' matrices.
  const int tiles = stage.outputs == 3 ? args_.dim / kNormLanes : 1 << 20;
  // From the codes of a block's columns to those of the fourth block after it: 64 columns on.
  const uint32_t step = 4 * stage.sent_bytes;
  // The first and third 16 columns of each 64 come before the second and fourth.
  const int block = lane / 16 + lane / 8 % 2 * 2;
  const uint32_t own_codes = SharedAddress(shared_ + args_.shared.codes) + block * (step / 4) +
                             lane % kRows * kClusterLanes;
  const auto codes_of = [&](int tile) {
    return own_codes + ((tile >= tiles) + (tile >= 2 * tiles)) * groups * kGroupBytes;
  };
  int tile = share.tile;
  int group = share.column_group;
  uint32_t at = codes_of(tile) + group * kGroupBytes;
  int32_t acc[2][4] = {};
#pragma unroll 1
  for (int left = share.count; left > 0; --left) {
    ring_.template Wait<1>();
    uint4 words[kUnitPieces];
    ring_.Read(words);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t b[4];
      LoadMatrix4(b, at + m * step);
      const uint32_t first = m % 2 == 0 ? words[m / 2].x : words[m / 2].z;
      const uint32_t second = m % 2 == 0 ? words[m / 2].y : words[m / 2].w;
      Mma(acc[0], first & 0x03030303u, first & 0x0c0c0c0cu, second & 0x03030303u,
          second & 0x0c0c0c0cu, b[0], b[1]);
      Mma(acc[1], first & 0x30303030u, first & 0xc0c0c0c0u, second & 0x30303030u,
          second & 0xc0c0c0c0u, b[2], b[3]);
    }
    // This lane has read its parts of the place that is filled now.
    ring_.Fetch();
    at += kGroupBytes;
    if (++group == groups || left == 1) {
      Flush(acc, tile);
      group = 0;
      at = codes_of(++tile);
    }
  }
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_STEP_CUH_
