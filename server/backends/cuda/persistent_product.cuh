// The product of a stage by a warp of the persistent decode kernel: pieces of weights from its ring
// with codes of the rows, mma.sync.
//
// A piece is 16 slots x 128 columns, or the same eight slots of two k-blocks (kHalved): lanes 0 to
// 15 then bring the rows of one k-block and lanes 16 to 31, as further rows, those of the next. The
// codes of the two are different columns of the other operand, and of the results those count whose
// row and column are of the same k-block.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_PRODUCT_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_PRODUCT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/backends/cuda/weight_ring.cuh"

namespace mmfree::cuda {

// Multiplies the warp's next kCount pieces, of one tile. `codes`: address of this lane's codes for
// the first; `step`: from a piece to the next.
template <int kCount, typename Ring>
__device__ __forceinline__ void MultiplyPieces(Ring& ring, uint32_t codes, uint32_t step,
                                               TileSums* sums) {
  ring.template Wait<kCount>();
  uint4 words[kCount][1];
#pragma unroll
  for (int p = 0; p < kCount; ++p) ring.Read(words[p]);
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    uint32_t b[2][4];
    LoadMatrix4(b[0], codes + p * step);
    LoadMatrix4(b[1], codes + p * step + 64);
    const uint4& four = words[p][0];
    MultiplySteps(four.x, four.y, b[0], sums);
    MultiplySteps(four.z, four.w, b[1], sums);
  }
  // This lane has read its parts of the places that are filled now.
#pragma unroll
  for (int p = 0; p < kCount; ++p) ring.Fetch();
}

// Multiplies a warp's share and adds it to buffers.sums.
template <int kRows, typename Ring>
__device__ __forceinline__ void MultiplyShare(const DecodeArgs& args, const StageBuffers& buffers,
                                              const PieceShare& share, Ring& ring) {
  const int lane = threadIdx.x % 32;
  const int code_stride = args.padded_cols + kCodePadding;
  const bool halved = args.unit_rows < kTileRows;
  const uint32_t step = halved ? 2 * kColumnBlock : kColumnBlock;
  const uint32_t own_codes = SharedAddress(buffers.codes) + lane % kRows * code_stride +
                             ChunkOf(lane / 8) * 16 +
                             (halved ? lane / kRows % 2 * kColumnBlock : 0);
  const int per_tile = PiecesPerTile(args.weights.k_blocks, args.unit_rows);
  int tile = share.tile;
  int piece = share.piece;
#pragma unroll 1
  for (int left = share.count; left > 0;) {
    int pieces = min(left, per_tile - piece);
    left -= pieces;
    const int output = args.kind == NormKind::kAttention ? tile % 3 : 0;
    uint32_t codes = own_codes + output * kRows * code_stride + piece * step;
    TileSums sums;
#pragma unroll 1
    for (; pieces >= 2; pieces -= 2, codes += 2 * step) {
      MultiplyPieces<2>(ring, codes, step, &sums);
    }
    if (pieces > 0) MultiplyPieces<1>(ring, codes, step, &sums);
    Flush<kRows>(sums, args.unit_rows / 2, buffers.sums + tile * args.unit_rows * kRows);
    piece = 0;
    ++tile;
  }
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_PRODUCT_CUH_
