// How the persistent decode kernel shares its work and its memory. Host and device.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_LAYOUT_H_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_LAYOUT_H_

#include <cstdint>

#include "server/backends/cuda/kernels.h"
#include "server/base/numerics.h"

#if defined(__CUDACC__)
#define MMFREE_CUDA_BOTH __host__ __device__
#else
#define MMFREE_CUDA_BOTH
#endif

namespace mmfree::cuda {

inline constexpr int kBlockThreads = kPersistentWarps * 32;  // 128 registers each
// The last warps sum a row's squares while the others make its codes, two lanes of the contract's
// sums a thread.
inline constexpr int kSummingWarps = kNormLanes / 64;
inline constexpr int kQuantizingWarps = kPersistentWarps - kSummingWarps;
// Warps that do something beside the products:
inline constexpr int kCopyingWarp = 0;
inline constexpr int kFencingWarp = 1;
inline constexpr int kScalingWarp = kPersistentWarps - 1;

inline constexpr int kHeadKind = 4;

MMFREE_CUDA_BOTH constexpr int OutputsOf(NormKind kind) {
  return kind == NormKind::kAttention ? 3 : 1;
}

// Pieces of a tile of `unit_rows` slots: 512 bytes each, of one k-block where a tile has 16 slots
// and of two where it has eight.
MMFREE_CUDA_BOTH constexpr int PiecesPerTile(int k_blocks, int unit_rows) {
  return k_blocks / (kTileRows / unit_rows);
}
MMFREE_CUDA_BOTH constexpr int PiecesPerTile(const PersistentKind& kind) {
  return PiecesPerTile(kind.k_blocks, kind.unit_rows);
}

// A block's units of a kind of stage.
struct BlockUnits {
  int first;
  int count;
};
MMFREE_CUDA_BOTH constexpr BlockUnits UnitsOfBlock(const PersistentKind& kind, int block,
                                                   int blocks) {
  const int first = static_cast<int>(int64_t{kind.units} * block / blocks);
  return {first, static_cast<int>(int64_t{kind.units} * (block + 1) / blocks) - first};
}

// A warp's share [first, end) of a block's pieces of a kind of stage.
struct PieceRange {
  int first;
  int end;
};
MMFREE_CUDA_BOTH constexpr PieceRange PiecesOfWarp(const PersistentKind& kind, int units,
                                                   int blocks, int warp) {
  const int16_t* const first = kind.first_piece[units - kind.units / blocks];
  return {first[warp], first[warp + 1]};
}
// The tiles that such a share is in.
MMFREE_CUDA_BOTH constexpr int TilesOfRange(const PersistentKind& kind, PieceRange range) {
  if (range.first >= range.end) return 0;
  const int per_tile = PiecesPerTile(kind);
  return (range.end - 1) / per_tile - range.first / per_tile + 1;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_LAYOUT_H_
