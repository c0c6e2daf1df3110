// How the warps of a block of the persistent decode kernel share its work and wait for each other.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/persistent_layout.h"

namespace mmfree::cuda {

inline constexpr int kStageArgs = 4;  // stages whose arguments are in shared memory

// A warp's share of the weights of a block's units.
struct PieceShare {
  int tile;
  int piece;  // of the tile
  int count;
};

// The static part of a block's shared memory.
template <int kRows>
struct PersistentBlock {
  alignas(16) uint8_t stages[kStageArgs][sizeof(DecodeArgs)];
  // mbarriers:
  uint64_t args[2];  // the arguments of a stage of even or of odd index are in shared memory
  uint64_t norms;    // the norms of a stage are
  int first_set;     // of the exchange buffers
  BlockUnits units[kStageKinds];
  PieceShare shares[kStageKinds][kPersistentWarps];
  // Of the present stage's rows, some by warp (persistent_norm.cuh):
  uint32_t max_z[kRows][kPersistentWarps];
  uint32_t max_t[3][kRows][kPersistentWarps];
  uint32_t row_max[3][kRows];
  float code_scales[3][kRows];
  float sum_xx[kRows][kSummingWarps];
  float sum_yy[kRows][kSummingWarps];
  int32_t warp_code_sums[3][kRows][kQuantizingWarps];
  union {
    StageScales<1, kRows> one;
    StageScales<3, kRows> three;
  } scales;
  union {
    int32_t one[1][kRows];
    int32_t three[3][kRows];
  } code_sums;
};

// The member of a union that has the outputs of this kind.
template <NormKind kKind, typename Union>
__device__ __forceinline__ auto& Of(Union& both) {
  if constexpr (NormTraits<kKind>::kOutputs == 1) {
    return both.one;
  } else {
    return both.three;
  }
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_
