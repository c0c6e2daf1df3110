// int8 x ternary product with mma.sync, for any number of tokens on every supported device.
//
// A block computes 64 slots x kTokens tokens: four warps of one 16-slot tile each. Activations come
// through shared memory in a three-stage ring; weights go straight to registers, one block of 128
// columns ahead.
#include <cuda_runtime.h>

#include "server/backends/cuda/epilogue.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"

namespace mmfree::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;

__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

template <int kTokens, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads) GemmMmaKernel(const __grid_constant__ GemmArgs args) {
  constexpr int kStageBytes = kTokens * kColumnBlock;
  constexpr int kTiles = kTokens / 8;
  __shared__ alignas(1024) uint8_t ring[kStages][kStageBytes];
  __shared__ RowMeta row_meta[kTokens];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row_block = blockIdx.x;
  const int first_token = blockIdx.y * kTokens;
  const int matrix = blockIdx.z;
  const int k_blocks = args.weights.k_blocks;
  const int64_t block_stride = int64_t{args.stride} * kColumnBlock;
  const int8_t* const q =
      args.q + matrix * k_blocks * block_stride + int64_t{first_token} * kColumnBlock;
  const uint8_t* const codes =
      args.weights.codes +
      (int64_t{matrix} * args.weights.row_blocks + row_block) * k_blocks * kBlockBytes +
      threadIdx.x * 16;

  const auto load_stage = [&](int k_block) {
    if (k_block < k_blocks) {
      const uint32_t to = SharedAddress(ring[k_block % kStages]);
      const int8_t* const from = q + k_block * block_stride;
      for (int at = threadIdx.x * 16; at < kStageBytes; at += kThreads * 16) {
        CopyAsync16(to + at, from + at);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  uint4 words = LoadWeights(codes);
  WaitForPrevious();
  AllowNext();
  load_stage(0);
  load_stage(1);
  // Visible to all after the first barrier of the loop.
  if (threadIdx.x < kTokens && first_token + threadIdx.x < args.max_tokens) {
    row_meta[threadIdx.x] = args.meta[int64_t{matrix} * args.stride + first_token + threadIdx.x];
  }

  int32_t acc[kTiles][4] = {};
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    load_stage(k_block + kStages - 1);
    const uint4 current = words;
    if (k_block + 1 < k_blocks) words = LoadWeights(codes + int64_t{k_block + 1} * kBlockBytes);

    const uint32_t stage = SharedAddress(ring[k_block % kStages]);
    const uint32_t word[4] = {current.x, current.y, current.z, current.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const WeightFragment a = Unpack(word[2 * half]);
      const WeightFragment b = Unpack(word[2 * half + 1]);
      const int chunk = 4 * half + lane / 8;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t x[4];
        LoadMatrix4(x, stage + (tile * 8 + lane % 8) * kColumnBlock + ((chunk ^ (lane % 8)) * 16));
        Mma(acc[tile], a.a0, a.a1, a.a2, a.a3, x[0], x[1]);
        Mma(acc[tile], b.a0, b.a1, b.a2, b.a3, x[2], x[3]);
      }
    }
  }

  const int64_t tile_index = int64_t{row_block} * (kRowBlock / kTileRows) + warp;
  float* const out = args.out + matrix * args.matrix_stride;
  const float scale = args.weights.scale[matrix];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = first_token + tile * 8 + 2 * (lane % 4) + j;
      if (token >= args.max_tokens) continue;
      FinishToken<kEpilogue>(acc[tile][j], acc[tile][2 + j], row_meta[token - first_token], scale,
                             tile_index, lane / 4, out + token * args.ld, args.ld);
    }
  }
}

template <int kTokens>
cudaError_t LaunchTokens(const GemmArgs& args, const LaunchContext& context) {
  const dim3 grid(args.weights.row_blocks, static_cast<uint32_t>(CeilDiv(args.max_tokens, kTokens)),
                  args.weights.matrices);
  switch (args.epilogue) {
    case Epilogue::kStore:
      return Launch<GemmMmaKernel<kTokens, Epilogue::kStore>>(context, grid, dim3(kThreads), 0,
                                                              args);
    case Epilogue::kResidual:
      return Launch<GemmMmaKernel<kTokens, Epilogue::kResidual>>(context, grid, dim3(kThreads), 0,
                                                                 args);
    case Epilogue::kSwiGlu:
      return Launch<GemmMmaKernel<kTokens, Epilogue::kSwiGlu>>(context, grid, dim3(kThreads), 0,
                                                               args);
    case Epilogue::kRecurrence:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchGemmMma(const GemmArgs& args, const LaunchContext& context) {
  if (args.max_tokens <= 8) return LaunchTokens<8>(args, context);
  if (args.max_tokens <= 32) return LaunchTokens<32>(args, context);
  return LaunchTokens<64>(args, context);
}

}  // namespace mmfree::cuda
