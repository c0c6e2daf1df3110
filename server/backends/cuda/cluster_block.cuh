// What the blocks of a cluster of the decode kernel know of its stages, and which parts of a model
// are theirs.
//
// A norm sums its columns in kNormLanes lanes, column k in lane k % kNormLanes, each in order, and
// then in a balanced tree over neighbouring lanes (server/model/NUMERICS.md). Block c of a cluster
// owns lanes [16 c, 16 c + 16): columns 256 j + 16 c + [0, 16) of every vector, for every column
// group j; its "own columns", numbered 16 j + [0, 16) within the block. They are one tile of 16
// outputs of a plain product and two neighbouring ones of a gated one (layout.h). So what a block
// multiplies is what it sums, and four levels of the tree are its own; the others take one value of
// each block.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_BLOCK_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/cluster_layout.h"
#include "server/backends/cuda/kernels.h"
#include "server/base/numerics.h"

namespace mmfree::cuda {

inline constexpr int kClusterWarps = 16;
inline constexpr int kClusterThreads = 32 * kClusterWarps;
static_assert(kClusterBlocks * kClusterLanes == kNormLanes);

// A unit of weights is 16 slots x 256 columns: two pieces (weight_ring.cuh).
inline constexpr int kUnitPieces = kNormLanes / kColumnBlock;

// The stages of a layer: a norm and the product that follows it.
inline constexpr int kRecurrenceStage = 0;
inline constexpr int kOutputStage = 1;
inline constexpr int kGateStage = 2;
inline constexpr int kDownStage = 3;

// Of a block's own columns of a row.
struct alignas(16) NormStats {
  float xx;
  float yy;
  uint32_t max_bits[3];
  uint32_t unused[3];
};

__host__ __device__ constexpr int ColumnGroups(int dim, int channels, int stage) {
  return (stage == kDownStage ? channels : dim) / kNormLanes;
}

// Tiles of 16 slots that a block multiplies in a stage.
__host__ __device__ constexpr int TilesOfBlock(int dim, int channels, int stage) {
  return stage == kRecurrenceStage ? 3 * (dim / kNormLanes)
         : stage == kGateStage     ? 2 * (channels / kNormLanes)
                                   : dim / kNormLanes;
}

// Where the n-th tile of block `rank` lies in a stage's weights, in row tiles.
__device__ __forceinline__ int RowTileOf(const ClusterDecodeArgs& args, int stage, int n,
                                         int rank) {
  if (stage == kGateStage) return 2 * (n / 2 * kClusterBlocks + rank) + n % 2;
  const int of_dim = args.dim / kNormLanes;
  return n / of_dim * args.stages[stage].row_blocks * (kRowBlock / kTileRows) +
         n % of_dim * kClusterBlocks + rank;
}

// What is the same in every layer. The stages share their code, which would not stay in the
// instruction cache otherwise, and differ by this.
struct ClusterStage {
  int outputs;        // of the norm: 3 or 1
  int two_norms;      // whether it is two stacked ones
  int column_groups;  // of the norm's input
  int norm_at;        // its weights among a layer's vectors, one vector for each output
  int inputs_at;      // in shared memory: the input of the first of two norms, or of the only one
  // What a block sends to the others: the codes of its columns,
  // [outputs][column groups][rows][kClusterLanes], and then their sums, [rows][4 outputs] int32.
  // In the same place in every block: [blocks] of it.
  int codes_bytes;
  int sent_bytes;
  int codes_received;
  int stats_received;
};

// A warp's share of the units of a stage.
struct ClusterShare {
  int tile;
  int column_group;
  int count;
};

template <int kRows>
__device__ __forceinline__ ClusterStage MakeClusterStage(const ClusterDecodeArgs& args, int stage) {
  constexpr int kNorms[] = {kINorm, kONorm, kGateNorm, kDownNorm};
  ClusterStage made;
  made.outputs = stage == kRecurrenceStage ? 3 : 1;
  made.two_norms = stage == kDownStage ? 0 : 1;
  made.column_groups = ColumnGroups(args.dim, args.channels, stage);
  made.norm_at = VectorAt(kNorms[stage], args.dim);
  made.inputs_at = stage == kOutputStage ? args.shared.gates
                   : stage == kDownStage ? args.shared.values
                                         : args.shared.hidden;
  made.codes_bytes = made.outputs * made.column_groups * kRows * kClusterLanes;
  made.sent_bytes = made.codes_bytes + kRows * 16;
  made.codes_received = (kClusterBlocks - 1) * made.sent_bytes;
  made.stats_received = kClusterBlocks * kRows * (made.outputs == 3 ? 32 : 16);
  return made;
}

// The static part of a block's shared memory.
template <int kRows>
struct ClusterBlock {
  // mbarriers. One phase a stage: all blocks' NormStats, and codes, have arrived.
  uint64_t stats;
  uint64_t codes;
  uint64_t norms;  // one phase a layer
  ClusterStage stages[kClusterStages];
  ClusterShare shares[kClusterStages][kClusterWarps];
  // Of the stage's rows, by output:
  float code_scales[kRows][4];  // RowScale::code,
  float out_scales[kRows][4];   // RowScale::out
  alignas(16) int32_t code_sums[kRows][4];
  // Of the next stage's norm: max |t| of the block's columns.
  alignas(16) uint32_t max_bits[kRows][4];
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_BLOCK_CUH_
