// One stage of a decode step of few rows in one kernel: norm, quantisation, int8 x ternary product
// with mma.sync, and what follows the product.
//
// Every block norms and quantises the whole rows for itself (they are a few KiB in the L2 cache;
// a kernel boundary costs more) and then computes its own 16-slot tiles. The weights of a block do
// not depend on the kernel before: they are loaded, or prefetched into L2, before it has ended.
#include <cuda_runtime.h>

#include <algorithm>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/epilogue.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {
namespace {

constexpr int kThreads = kNormLanes;
constexpr int kWarps = kThreads / 32;
constexpr int kPrefetch = 8;  // weight loads a warp keeps in flight
constexpr int kBlocksPerSm = 2;
constexpr int kCodePadding = 16;  // bytes; rows of codes start in different banks

template <NormKind kKind>
struct Traits {
  static constexpr int kOutputs = kKind == NormKind::kAttention ? 3 : 1;
  static constexpr bool kOneNorm = kKind == NormKind::kOneNorm;
  static constexpr bool kHasY = kKind == NormKind::kScanned;
  static constexpr bool kHasW1 = kKind == NormKind::kAttention || kKind == NormKind::kHidden;
  // Rows of a product that belong to one unit of work: i, f and g of 16 channels, or one tile.
  static constexpr int kTilesPerUnit = kKind == NormKind::kAttention ? 3 : 1;
};

// Dynamic shared memory of a block.
template <NormKind kKind, int kRows>
struct SharedLayout {
  float* x;        // [kRows][padded]
  float* y;        // [kRows][padded] when y is given
  float* w1;       // [padded]
  float* w2;       // [kOutputs][padded]
  uint8_t* codes;  // [kOutputs][kRows][padded + kCodePadding]
  int32_t* sums;   // [tiles][kTileRows][kRows]

  // Binds to `base` and returns the bytes taken.
  __host__ __device__ int64_t Bind(uint8_t* base, int64_t padded, int64_t tiles) {
    using T = Traits<kKind>;
    int64_t at = 0;
    x = reinterpret_cast<float*>(base + at);
    at += kRows * padded * 4;
    y = reinterpret_cast<float*>(base + at);
    at += T::kHasY ? kRows * padded * 4 : 0;
    w1 = reinterpret_cast<float*>(base + at);
    at += T::kHasW1 ? padded * 4 : 0;
    w2 = reinterpret_cast<float*>(base + at);
    at += T::kOutputs * padded * 4;
    codes = base + at;
    at += T::kOutputs * kRows * (padded + kCodePadding);
    sums = reinterpret_cast<int32_t*>(base + at);
    return at + tiles * kTileRows * kRows * 4;
  }
};

__device__ __forceinline__ void CopyAsync16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncFloats(float* to, const float* from, int count) {
  for (int k = 4 * threadIdx.x; k < count; k += 4 * kThreads) CopyAsync16(to + k, from + k);
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Walks a warp's share of a block's weights: pieces of 16 x 128, tile by tile.
struct WeightCursor {
  uint32_t at;  // this lane's 16 bytes, in units of 16 bytes from the start of the codes
  int tile;
  int k_block;
};

template <NormKind kKind>
__device__ __forceinline__ WeightCursor CursorAt(const DecodeArgs& args, int first_tile, int tile,
                                                 int k_block) {
  constexpr int kPerUnit = Traits<kKind>::kTilesPerUnit;
  const int matrix = tile % kPerUnit;
  const int row_tile = first_tile + tile / kPerUnit;
  const uint32_t block = static_cast<uint32_t>(
      (matrix * args.weights.row_blocks + row_tile / 4) * args.weights.k_blocks + k_block);
  return {block * (kBlockBytes / 16) + row_tile % 4 * 32 + threadIdx.x % 32, tile, k_block};
}

template <NormKind kKind>
__device__ __forceinline__ void Advance(const DecodeArgs& args, int first_tile,
                                        WeightCursor* cursor) {
  cursor->at += kBlockBytes / 16;
  if (++cursor->k_block == args.weights.k_blocks) {
    *cursor = CursorAt<kKind>(args, first_tile, cursor->tile + 1, 0);
  }
}

__device__ __forceinline__ const uint8_t* At(const DecodeArgs& args, const WeightCursor& cursor) {
  return args.weights.codes + uint64_t{cursor.at} * 16;
}

// First pass over one row: its ordered sums and its maxima.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void NormRow(const DecodeArgs& args,
                                        const SharedLayout<kKind, kRows>& shared, int row,
                                        NormPartials<Traits<kKind>::kOutputs>* partials) {
  using T = Traits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr int kBatch = 5;
  const int padded = args.padded_cols;
  const int norm_lane = threadIdx.x;
  const float* const x_row = shared.x + row * padded;
  const float* const y_row = T::kHasY ? shared.y + row * padded : shared.w1;
  float sum_xx = 0.0f;
  float sum_yy = 0.0f;
  uint32_t max_bits[kOutputs] = {};
#pragma unroll 1
  for (int base = norm_lane; base < args.cols; base += kBatch * kNormLanes) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = base + i * kNormLanes;
      if (k >= args.cols) break;
      const float x = x_row[k];
      float y = x;
      if constexpr (T::kHasW1) y = x * y_row[k];
      if constexpr (T::kHasY) y = y_row[k];
      sum_xx = fmaf(x, x, sum_xx);
      if constexpr (!T::kOneNorm) sum_yy = fmaf(y, y, sum_yy);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        max_bits[o] = max(max_bits[o], AbsBits(y * shared.w2[o * padded + k]));
      }
    }
  }
  StorePartials<kOutputs>(sum_xx, sum_yy, max_bits, norm_lane / 32, norm_lane % 32, partials);
}

// Second pass: the codes of rows [first_row, first_row + kPass).
template <NormKind kKind, int kRows, int kPass, bool kPlain>
__device__ __forceinline__ void QuantizeRows(
    const DecodeArgs& args, const SharedLayout<kKind, kRows>& shared, int first_row,
    const CodeScale (&scales)[Traits<kKind>::kOutputs][kRows],
    int32_t (&code_sums)[Traits<kKind>::kOutputs][kRows]) {
  constexpr int kOutputs = Traits<kKind>::kOutputs;
  const int padded = args.padded_cols;
  int32_t sums[kOutputs][kPass] = {};
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * kThreads) {
    uint32_t codes[kOutputs][kPass];
    float4 y[kPass];
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      const float* const from = Traits<kKind>::kHasY ? shared.y : shared.x;
      y[r] = *reinterpret_cast<const float4*>(from + (first_row + r) * padded + k);
      if constexpr (Traits<kKind>::kHasW1) {
        const float4 w = *reinterpret_cast<const float4*>(shared.w1 + k);
        y[r] = make_float4(y[r].x * w.x, y[r].y * w.y, y[r].z * w.z, y[r].w * w.w);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float4 w = *reinterpret_cast<const float4*>(shared.w2 + o * padded + k);
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        codes[o][r] = QuantizeQuad<kPlain>(y[r], w, scales[o][first_row + r].scale, &sums[o][r]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        const int at = (o * kRows + first_row + r) * (padded + kCodePadding) + k;
        *reinterpret_cast<uint32_t*>(shared.codes + at) = codes[o][r];
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      const int32_t sum = __reduce_add_sync(0xffffffffu, sums[o][r]);
      if (threadIdx.x % 32 == 0) atomicAdd(&code_sums[o][first_row + r], sum);
    }
  }
}

// Adds a warp's sums of one tile to the block's.
template <int kRows>
__device__ __forceinline__ void Flush(int32_t (&acc)[2][4], int32_t* sums) {
  const int lane = threadIdx.x % 32;
  const int slot = lane / 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = 2 * (lane % 4) + j;
    if (row < kRows) {
      atomicAdd(&sums[slot * kRows + row], acc[0][j] + acc[1][j]);
      atomicAdd(&sums[(slot + 8) * kRows + row], acc[0][2 + j] + acc[1][2 + j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
}

// What an epilogue thread reads from memory, early enough to be there when the sums are.
struct EpilogueInput {
  float state = 0.0f;
  float lower_bound = 0.0f;
  float g_norm = 0.0f;
  float2 residual = {0.0f, 0.0f};
};

template <NormKind kKind, Epilogue kEpilogue, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    DecodeKernel(const __grid_constant__ DecodeArgs args) {
  using T = Traits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr bool kRecurrence = kEpilogue == Epilogue::kRecurrence;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ NormPartials<kOutputs> partials[kRows];
  __shared__ CodeScale code_scales[kOutputs][kRows];
  __shared__ RowScale scales[kOutputs][kRows];
  __shared__ int32_t code_sums[kOutputs][kRows];

  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int first_tile = blockIdx.x * args.units_per_block;
  const int units = min(args.units_per_block, args.units - first_tile);
  const int tiles = units * T::kTilesPerUnit;
  SharedLayout<kKind, kRows> shared;
  shared.Bind(dynamic_shared, args.padded_cols, args.units_per_block * T::kTilesPerUnit);

  // Weights: this warp's share of the block's pieces.
  const int k_blocks = args.weights.k_blocks;
  const int pieces = tiles * k_blocks;
  // The last warp, which also forms the exact scales, gets half a share.
  constexpr int kShares = 2 * kWarps - 1;
  const int first = pieces * 2 * warp / kShares;
  const int count = min(pieces * 2 * (warp + 1) / kShares, pieces) - first;
  int tile = first / k_blocks;  // of the next piece to multiply
  int k_block = first % k_blocks;
  WeightCursor loader = CursorAt<kKind>(args, first_tile, tile, k_block);
  uint4 words[kPrefetch];
#pragma unroll
  for (int p = 0; p < kPrefetch; ++p) {
    if (p < count) {
      words[p] = LoadWeights(At(args, loader));
      Advance<kKind>(args, first_tile, &loader);
    }
  }
  WeightCursor ahead = loader;
  for (int p = kPrefetch; p < count; ++p) {
    // A piece is four cache lines: one lane in eight fetches each.
    if (lane % 8 == 0) PrefetchL2(At(args, ahead));
    Advance<kKind>(args, first_tile, &ahead);
  }

  if constexpr (T::kHasW1) CopyAsyncFloats(shared.w1, args.w1, args.padded_cols);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    CopyAsyncFloats(shared.w2 + o * args.padded_cols, args.w2[o], args.padded_cols);
  }
  for (int i = thread; i < tiles * kTileRows * kRows; i += kThreads) shared.sums[i] = 0;
  if (thread < kOutputs * kRows) code_sums[thread / kRows][thread % kRows] = 0;

  // The epilogue's work of this thread: channel or slot pair `own` of row own_row. What it reads
  // was written by the kernel before the previous one or earlier, which had ended when the previous
  // one let this one start.
  const int own_row = thread % kRows;
  const int own = thread / kRows;
  const int32_t num_rows = *args.num_rows;
  const int32_t channel = first_tile * kTileRows + own;
  const int own_tile = first_tile + own / 8;
  const bool owns = own_row < num_rows && own < units * (kRecurrence ? kTileRows : 8) &&
                    (!kRecurrence || channel < args.cols);
  float* const out_row = args.out + own_row * args.ld;
  int32_t slot = 0;
  EpilogueInput input;
  if constexpr (kRecurrence) {
    if (owns) {
      slot = args.rows[own_row].slot;
      input.lower_bound = args.lower_bound[channel];
      input.g_norm = args.g_norm[channel];
      input.state = __ldcg(args.states + slot * args.state_stride + channel);
    }
  }
  if constexpr (kEpilogue == Epilogue::kResidual) {
    const int row = own_tile * kTileRows + 2 * (own % 8);
    if (owns && row < args.ld) {
      input.residual = __ldcg(reinterpret_cast<const float2*>(out_row + row));
    }
  }
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
      shared.x[row * args.padded_cols + k] = 0.0f;
      if constexpr (T::kHasY) shared.y[row * args.padded_cols + k] = 0.0f;
    }
  }

  WaitForPrevious();
  AllowNext();
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t from = int64_t{source[row]} * args.ld_x;
    CopyAsyncFloats(shared.x + row * args.padded_cols, args.x + from, args.ld_x);
    if constexpr (T::kHasY) {
      CopyAsyncFloats(shared.y + row * args.padded_cols, args.y + from, args.ld_x);
    }
  }
  WaitForCopies();
  __syncthreads();

#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
    NormRow<kKind, kRows>(args, shared, row, &partials[row]);
  }
  __syncthreads();
  const float n = static_cast<float>(args.cols);
  if (thread < kOutputs * kRows) {
    code_scales[thread % kOutputs][thread / kOutputs] =
        CodeScaleOf<T::kOneNorm>(partials[thread / kOutputs], thread % kOutputs, n, args.eps);
  }
  __syncthreads();
  bool plain = true;
#pragma unroll
  for (int i = 0; i < kOutputs * kRows; ++i) {
    plain = plain && code_scales[i % kOutputs][i / kOutputs].plain;
  }
  constexpr int kPass = kRows < 2 ? kRows : 2;
#pragma unroll 1
  for (int row = 0; row < kRows; row += kPass) {
    if (plain) {
      QuantizeRows<kKind, kRows, kPass, true>(args, shared, row, code_scales, code_sums);
    } else {
      QuantizeRows<kKind, kRows, kPass, false>(args, shared, row, code_scales, code_sums);
    }
  }
  __syncthreads();

  if (warp == kWarps - 1 && lane < kOutputs * kRows) {
    scales[lane % kOutputs][lane / kOutputs] =
        ScaleOf<T::kOneNorm>(partials[lane / kOutputs], lane % kOutputs, n, args.eps);
  }
  const uint32_t codes = SharedAddress(shared.codes);
  const int code_stride = args.padded_cols + kCodePadding;
  const uint32_t own_codes = codes + lane % kRows * code_stride + lane / 8 * 16;
  int32_t acc[2][4] = {};
  for (int base = 0; base < count; base += kPrefetch) {
#pragma unroll
    for (int p = 0; p < kPrefetch; ++p) {
      const int piece = base + p;
      if (piece >= count) break;
      const uint4 current = words[p];
      if (piece + kPrefetch < count) {
        words[p] = LoadWeights(At(args, loader));
        Advance<kKind>(args, first_tile, &loader);
      }
      const int output = kOutputs == 1 ? 0 : tile % kOutputs;
      const uint32_t at = own_codes + output * kRows * code_stride + k_block * kColumnBlock;
      uint32_t b[2][4];
      LoadMatrix4(b[0], at);
      LoadMatrix4(b[1], at + 64);
      const uint32_t word[4] = {current.x, current.y, current.z, current.w};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const WeightFragment a = Unpack(word[step]);
        Mma(acc[step % 2], a.a0, a.a1, a.a2, a.a3, b[step / 2][step % 2 * 2],
            b[step / 2][step % 2 * 2 + 1]);
      }
      if (++k_block == k_blocks || piece + 1 == count) {
        Flush<kRows>(acc, shared.sums + tile * kTileRows * kRows);
        k_block = 0;
        ++tile;
      }
    }
  }
  __syncthreads();

  if (!owns) return;
  if constexpr (kRecurrence) {
    // Row `own` of its tile sits in slot own/2, or own/2 + 8 with its sums times four.
    const int in_tile = own % kTileRows;
    const int tile_slot = in_tile / 2 + in_tile % 2 * 8;
    const int own_sums = own / kTileRows * 3 * kTileRows;
    float values[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const int32_t sum = shared.sums[(own_sums + m * kTileRows + tile_slot) * kRows + own_row];
      const float factor = scales[m][own_row].out * args.weights.scale[m];
      values[m] =
          static_cast<float>((in_tile % 2 == 0 ? sum : sum >> 2) - code_sums[m][own_row]) * factor;
    }
    // Recur and GateOutput of numerics.h, the two gates' divisions side by side.
    float gates[2] = {1.0f, values[0]};
    const float divisors[2] = {1.0f + Exp(-values[1]), 1.0f + Exp(-values[0])};
    DivideBatch(gates, divisors, gates);
    const float forget = fmaf(1.0f - input.lower_bound, gates[0], input.lower_bound);
    const float next[1] = {fmaf(forget, input.state, gates[1] * (1.0f - forget))};
    float silu[1];
    SiluBatch(next, silu);
    args.states[slot * args.state_stride + channel] = next[0];
    out_row[channel] = values[2];
    args.gated[own_row * args.ld + channel] = (values[2] * input.g_norm) * silu[0];
  } else {
    const int pair = own % 8;
    const int32_t* const sums = shared.sums + own / 8 * kTileRows * kRows + own_row;
    const RowMeta meta = {scales[0][own_row].out, code_sums[0][own_row]};
    FinishToken<kEpilogue>(sums[pair * kRows], sums[(pair + 8) * kRows], meta,
                           args.weights.scale[0], own_tile, pair, out_row, args.ld, input.residual);
  }
}

template <NormKind kKind, int kRows>
int64_t SharedBytes(const DecodeArgs& args) {
  SharedLayout<kKind, kRows> layout;
  return layout.Bind(nullptr, args.padded_cols,
                     int64_t{args.units_per_block} * Traits<kKind>::kTilesPerUnit);
}

// Blocks take whole units: one block a multiprocessor, so that the next kernel's find room beside
// them, and at most what one epilogue item a thread can finish.
template <NormKind kKind, Epilogue kEpilogue, int kRows>
cudaError_t LaunchRows(DecodeArgs args, const LaunchContext& context) {
  constexpr int kItemsPerUnit = (kEpilogue == Epilogue::kRecurrence ? kTileRows : 8) * kRows;
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
