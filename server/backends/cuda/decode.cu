// Each stage of a decode step of few rows (decode_stage.cuh) as one kernel.
//
// Every block norms and quantises the whole rows for itself (they are a few KiB in the L2 cache;
// a kernel boundary costs more) and then computes its own units. The weights of a block do not
// depend on the kernel before: they are loaded, or prefetched into L2, before it has ended.
#include <cuda_runtime.h>

#include <algorithm>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"

namespace mmfree::cuda {
namespace {

constexpr int kThreads = kNormLanes;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;

// Binds the parts of a block's dynamic shared memory to `base` and returns the bytes taken.
template <NormKind kKind, int kRows>
__host__ __device__ int64_t Bind(uint8_t* base, int64_t padded, int64_t tiles,
                                 StageBuffers* buffers) {
  using T = NormTraits<kKind>;
  int64_t at = 0;
  buffers->x = reinterpret_cast<float*>(base + at);
  at += kRows * padded * 4;
  buffers->y = reinterpret_cast<float*>(base + at);
  at += T::kHasY ? kRows * padded * 4 : 0;
  buffers->w1 = reinterpret_cast<float*>(base + at);
  at += T::kHasW1 ? padded * 4 : 0;
  buffers->w2 = reinterpret_cast<float*>(base + at);
  at += T::kOutputs * padded * 4;
  buffers->codes = base + at;
  at += T::kOutputs * kRows * (padded + kCodePadding);
  buffers->sums = reinterpret_cast<int32_t*>(base + at);
  return at + tiles * kTileRows * kRows * 4;
}

template <NormKind kKind, Epilogue kEpilogue, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    DecodeKernel(const __grid_constant__ DecodeArgs args) {
  using T = NormTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr int kPerUnit = TilesPerUnit(kKind);
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ NormPartials<kOutputs> partials[kRows];
  __shared__ StageScales<kOutputs, kRows> scales;
  __shared__ int32_t code_sums[kOutputs][kRows];

  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int first_unit = blockIdx.x * args.units_per_block;
  const int units = min(args.units_per_block, args.units - first_unit);
  const int tiles = units * kPerUnit;
  StageBuffers buffers;
  Bind<kKind, kRows>(dynamic_shared, args.padded_cols, args.units_per_block * kPerUnit, &buffers);

  WeightShare share;
  SplitWeights<kWarps>(args, kPerUnit, first_unit, units, warp, &share);
  LoadFirstWeights(args, kPerUnit, first_unit, &share);
  if constexpr (T::kHasW1) CopyAsyncFloats<kThreads>(buffers.w1, args.w1, args.padded_cols);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    CopyAsyncFloats<kThreads>(buffers.w2 + o * args.padded_cols, args.w2[o], args.padded_cols);
  }
  for (int i = thread; i < tiles * kTileRows * kRows; i += kThreads) buffers.sums[i] = 0;
  if (thread < kOutputs * kRows) code_sums[thread / kRows][thread % kRows] = 0;

  // The kernel before the previous one had ended when the previous one let this one start.
  const int32_t num_rows = *args.num_rows;
  const EpilogueItem<kEpilogue, kRows> item(args, first_unit, units, kLogTileRows, num_rows);
  const int32_t slot =
      kEpilogue == Epilogue::kRecurrence && item.owned ? args.rows[item.row].slot : 0;
  const EpilogueInput input = LoadEpilogueInput(args, item, slot);
  int32_t source[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    source[row] = row;
    if (args.gather != nullptr) source[row] = row < num_rows ? args.gather[row].token : 0;
  }
  // The codes of the columns beyond a row are zeros.
  for (int k = args.ld_x + thread; k < args.padded_cols; k += kThreads) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      buffers.x[row * args.padded_cols + k] = 0.0f;
      if constexpr (T::kHasY) buffers.y[row * args.padded_cols + k] = 0.0f;
    }
  }

  WaitForPrevious();
  AllowNext();
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t from = int64_t{source[row]} * args.ld_x;
    CopyAsyncFloats<kThreads>(buffers.x + row * args.padded_cols, args.x + from, args.ld_x);
    if constexpr (T::kHasY) {
      CopyAsyncFloats<kThreads>(buffers.y + row * args.padded_cols, args.y + from, args.ld_x);
    }
  }
  WaitForCopies();
  __syncthreads();

#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
    NormRow<kKind>(args, buffers, row, thread, &partials[row]);
  }
  __syncthreads();
  Quantize<kKind, kRows, kThreads>(args, buffers, partials, &scales, code_sums);
  if (warp == kWarps - 1 && lane < kOutputs * kRows) {
    scales.row[lane % kOutputs][lane / kOutputs] = ScaleOf<T::kOneNorm>(
        partials[lane / kOutputs], lane % kOutputs, static_cast<float>(args.cols), args.eps);
  }
  Multiply<kKind, kRows>(args, buffers, first_unit, &share);
  __syncthreads();
  if (!item.owned) return;
  StoreOutput(args, item, slot,
              Finish<kKind>(args, buffers, scales, code_sums, item, kLogTileRows, input));
}

template <NormKind kKind, int kRows>
int64_t SharedBytes(const DecodeArgs& args) {
  StageBuffers buffers;
  return Bind<kKind, kRows>(nullptr, args.padded_cols,
                            int64_t{args.units_per_block} * TilesPerUnit(kKind), &buffers);
}

// Blocks take whole units: one block a multiprocessor, so that the next kernel's find room beside
// them, and at most what one epilogue item a thread can finish.
template <NormKind kKind, Epilogue kEpilogue, int kRows>
cudaError_t LaunchRows(DecodeArgs args, const LaunchContext& context) {
  constexpr int kItemsPerUnit = EpilogueItem<kEpilogue, kRows>::PerUnit(kLogTileRows) * kRows;
  args.units = args.weights.row_blocks * (kRowBlock / kTileRows);
  args.units_per_block = static_cast<int32_t>(std::min<int64_t>(
      CeilDiv(args.units, int64_t{kBlocksPerSm} * context.num_sms), kThreads / kItemsPerUnit));
  return Launch<DecodeKernel<kKind, kEpilogue, kRows>>(
      context, dim3(static_cast<uint32_t>(CeilDiv(args.units, args.units_per_block))),
      dim3(kThreads), SharedBytes<kKind, kRows>(args), args);
}

template <NormKind kKind, Epilogue kEpilogue>
cudaError_t LaunchStage(const DecodeArgs& args, const LaunchContext& context) {
  if (args.max_rows == 1) return LaunchRows<kKind, kEpilogue, 1>(args, context);
  return LaunchRows<kKind, kEpilogue, 2>(args, context);
}

}  // namespace

bool DecodeFits(int64_t dim, int64_t channels, int64_t shared_bytes) {
  // The largest stages: norms of a row of `channels`, and three quantised copies of a row of `dim`.
  DecodeArgs args;
  args.units_per_block = 64;
  args.padded_cols = static_cast<int32_t>(RoundUp(channels, kColumnBlock));
  const int64_t down = SharedBytes<NormKind::kOneNorm, kMaxDecodeRows>(args);
  args.padded_cols = static_cast<int32_t>(RoundUp(dim, kColumnBlock));
  const int64_t attention = SharedBytes<NormKind::kAttention, kMaxDecodeRows>(args);
  const int64_t output = SharedBytes<NormKind::kScanned, kMaxDecodeRows>(args);
  constexpr int64_t kStaticBytes = 3072;
  return std::max({down, attention, output}) + kStaticBytes <= shared_bytes;
}

cudaError_t LaunchDecode(const DecodeArgs& args, const LaunchContext& context) {
  if (args.kind == NormKind::kAttention && args.epilogue == Epilogue::kRecurrence) {
    return LaunchStage<NormKind::kAttention, Epilogue::kRecurrence>(args, context);
  }
  if (args.kind == NormKind::kScanned && args.epilogue == Epilogue::kResidual) {
    return LaunchStage<NormKind::kScanned, Epilogue::kResidual>(args, context);
  }
  if (args.kind == NormKind::kHidden && args.epilogue == Epilogue::kSwiGlu) {
    return LaunchStage<NormKind::kHidden, Epilogue::kSwiGlu>(args, context);
  }
  if (args.kind == NormKind::kOneNorm && args.epilogue == Epilogue::kResidual) {
    return LaunchStage<NormKind::kOneNorm, Epilogue::kResidual>(args, context);
  }
  if (args.kind == NormKind::kHidden && args.epilogue == Epilogue::kStore) {
    return LaunchStage<NormKind::kHidden, Epilogue::kStore>(args, context);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmfree::cuda
