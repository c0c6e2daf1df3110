// How the warps of a block of the persistent decode kernel share its work and wait for each other.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/norm.cuh"

namespace mmfree::cuda {

inline constexpr int kComputingWarps = 15;  // with the service warp, 128 registers a thread
inline constexpr int kComputingThreads = kComputingWarps * 32;
inline constexpr int kBlockThreads = kComputingThreads + 32;
inline constexpr int kFirstSummingWarp = kComputingWarps - kNormWarps;  // the last ones sum
inline constexpr int kStageArgs = 4;   // stages whose arguments are in shared memory
inline constexpr int kStageKinds = 5;  // four a layer and the head
inline constexpr int kHeadKind = 4;

// Named barriers among the computing warps; with the service warp they meet through mbarriers.
enum class Among : int {
  kComputing = 1,  // all of them
  kSumming = 2,    // those that form the norms' sums
};
template <Among kAmong>
__device__ __forceinline__ void Sync() {
  constexpr int kThreads = kAmong == Among::kComputing ? kComputingThreads : kNormLanes;
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kAmong)), "n"(kThreads) : "memory");
}

__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void AddRelease(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__host__ __device__ constexpr int OutputsOf(NormKind kind) {
  return kind == NormKind::kAttention ? 3 : 1;
}

// The first of a stage's `pieces` pieces that belongs to warp `warp`.
template <int kRows>
__host__ __device__ __forceinline__ int FirstPiece(int pieces, int warp) {
  // Those that sum get less, the last, which also forms the scales, least.
  constexpr int kSpared = kRows == 1 ? 3 : 4;
  constexpr int kSumming = 2;
  constexpr int kTotal = kFirstSummingWarp * kSpared + kNormWarps * kSumming - 1;
  const int parts = warp <= kFirstSummingWarp
                        ? kSpared * warp
                        : kSpared * kFirstSummingWarp + kSumming * (warp - kFirstSummingWarp);
  return pieces * (parts < kTotal ? parts : kTotal) / kTotal;
}

// A block's units of a kind of stage and a warp's share of their weights.
struct BlockUnits {
  int first;
  int count;
};
struct PieceShare {
  int tile;
  int k_block;
  int count;  // pieces
};

// The static part of a block's shared memory.
template <int kRows>
struct PersistentBlock {
  alignas(16) uint8_t stages[kStageArgs][sizeof(DecodeArgs)];
  // mbarriers, one phase a stage:
  uint64_t ready;      // every block has finished the stage before
  uint64_t norms;      // the norms are in shared memory
  uint64_t quantized;  // they are not needed any more
  uint64_t finished;   // the computing warps have written what the stage writes
  BlockUnits units[kStageKinds];
  PieceShare shares[kStageKinds][kComputingWarps];
  // Of the present stage's rows, some by warp (persistent_norm.cuh):
  uint32_t max_z[kRows][kComputingWarps];
  uint32_t max_t[3][kRows][kComputingWarps];
  uint32_t row_max[3][kRows];
  float code_scales[3][kRows];
  NormPartials<1> partials[kRows];  // only the sums are used
  int32_t warp_code_sums[3][kRows][kComputingWarps];
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
  if constexpr (StageTraits<kKind>::kOutputs == 1) {
    return both.one;
  } else {
    return both.three;
  }
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_BLOCK_CUH_
