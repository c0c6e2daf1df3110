// Stored ternary form (server/model/ternary.h) to the device layout (layout.h).
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/model/ternary.h"

namespace mmfree::cuda {
namespace {

struct RepackArgs {
  const uint8_t* stored;  // [ceil(rows / 4)][stored_cols]
  int64_t rows;
  int64_t cols;
  int64_t stored_cols;
  int64_t gated_channels;
  int32_t k_blocks;
  uint4* out;  // [row_blocks][k_blocks][128]
};

__device__ uint32_t Code(const RepackArgs& args, int64_t row, int64_t col) {
  if (row < 0 || col >= args.cols) return 1;
  const uint8_t byte = args.stored[row / kTernaryRowGroup * args.stored_cols + col];
  return (byte >> (2 * (row % kTernaryRowGroup))) & 3u;
}

// The logical row of a slot; -1 for padding.
__device__ int64_t RowOfSlot(const RepackArgs& args, int64_t tile, int g, int half) {
  if (args.gated_channels > 0) {
    const int64_t channel = tile * (kTileRows / 2) + g;
    return channel < args.gated_channels ? half * args.gated_channels + channel : -1;
  }
  const int64_t row = tile * kTileRows + 2 * g + half;
  return row < args.rows ? row : -1;
}

// One block of 128 threads writes one 64 x 128 block of weights.
__global__ void RepackKernel(const RepackArgs args) {
  const int64_t k_block = blockIdx.x;
  const int64_t row_block = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int64_t tile = row_block * (kRowBlock / kTileRows) + threadIdx.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t rows[2] = {RowOfSlot(args, tile, g, 0), RowOfSlot(args, tile, g, 1)};
  uint32_t words[4];
  for (int step = 0; step < 4; ++step) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int64_t col = k_block * kColumnBlock + 32 * step + 16 * (i >> 1) + 4 * t + j;
        word |= Code(args, rows[i & 1], col) << (8 * j + 2 * i);
      }
    }
    words[step] = word;
  }
  args.out[(row_block * args.k_blocks + k_block) * 128 + threadIdx.x] =
      make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace

cudaError_t LaunchRepack(const uint8_t* stored, int64_t rows, int64_t cols, int64_t stored_cols,
                         int64_t gated_channels, int32_t row_blocks, int32_t k_blocks, uint8_t* out,
                         cudaStream_t stream) {
  const RepackArgs args = {
      stored, rows, cols, stored_cols, gated_channels, k_blocks, reinterpret_cast<uint4*>(out)};
  RepackKernel<<<dim3(k_blocks, row_blocks), 128, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace mmfree::cuda
