// The parts of a stage of a decode step: norm, quantisation, int8 x ternary product with mma.sync
// and what follows the product, for a block that norms whole rows (kNormLanes threads a row) and
// multiplies its own units of weights. A unit is a tile of 16 slots, or one of each of i, f and g.
//
// decode.cu makes a kernel of each stage, decode_persistent.cu one kernel of all.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DECODE_STAGE_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_DECODE_STAGE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/epilogue.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {

inline constexpr int kStagePrefetch = 8;  // weight loads a warp keeps in flight

__host__ __device__ constexpr int TilesPerUnit(NormKind kind) {
  return kind == NormKind::kAttention ? 3 : 1;
}

// Parts of a block's shared memory; `padded` is DecodeArgs::padded_cols.
struct StageBuffers {
  float* x;        // [rows][padded]
  float* y;        // [rows][padded], where a stage is given y
  float* w1;       // [padded]
  float* w2;       // [outputs][padded]
  uint8_t* codes;  // [outputs][rows][padded + kCodePadding]
  int32_t* sums;   // [tiles][kTileRows][rows]
};

// What a stage knows of its rows.
template <int kOutputs, int kRows>
struct StageScales {
  CodeScale code[kOutputs][kRows];
  RowScale row[kOutputs][kRows];
};

__device__ __forceinline__ void CopyAsync16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
template <int kThreads>
__device__ __forceinline__ void CopyAsyncFloats(float* to, const float* from, int count) {
  for (int k = 4 * threadIdx.x; k < count; k += 4 * kThreads) CopyAsync16(to + k, from + k);
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Walks weights in pieces of 16 x 128, tile by tile of a block's units.
struct WeightCursor {
  uint32_t at;  // this lane's 16 bytes, in units of 16 bytes from the start of the codes
  int tile;
  int k_block;
};

__device__ __forceinline__ WeightCursor CursorAt(const DecodeArgs& args, int tiles_per_unit,
                                                 int first_unit, int tile, int k_block) {
  const int matrix = tile % tiles_per_unit;
  const int row_tile = first_unit + tile / tiles_per_unit;
  const uint32_t block = static_cast<uint32_t>(
      (matrix * args.weights.row_blocks + row_tile / 4) * args.weights.k_blocks + k_block);
  return {block * (kBlockBytes / 16) + row_tile % 4 * 32 + threadIdx.x % 32, tile, k_block};
}

__device__ __forceinline__ void Advance(const DecodeArgs& args, int tiles_per_unit, int first_unit,
                                        WeightCursor* cursor) {
  cursor->at += kBlockBytes / 16;
  if (++cursor->k_block == args.weights.k_blocks) {
    *cursor = CursorAt(args, tiles_per_unit, first_unit, cursor->tile + 1, 0);
  }
}

__device__ __forceinline__ const uint8_t* At(const DecodeArgs& args, const WeightCursor& cursor) {
  return args.weights.codes + uint64_t{cursor.at} * 16;
}

// A warp's share of the weights of a block: `count` pieces, the first of them in registers.
struct WeightShare {
  uint4 words[kStagePrefetch];
  WeightCursor loader;  // of the first piece that is not in `words`
  int count;
  int tile;  // of the first piece
  int k_block;
};

// Splits the pieces of `units` units among the block's warps. The last warp, which also forms the
// exact scales, gets half a share.
template <int kWarps>
__device__ __forceinline__ void SplitWeights(const DecodeArgs& args, int tiles_per_unit,
                                             int first_unit, int units, int warp,
                                             WeightShare* share) {
  constexpr int kShares = 2 * kWarps - 1;
  const int k_blocks = args.weights.k_blocks;
  const int pieces = units * tiles_per_unit * k_blocks;
  const int first = pieces * 2 * warp / kShares;
  share->count = min(pieces * 2 * (warp + 1) / kShares, pieces) - first;
  share->tile = first / k_blocks;
  share->k_block = first % k_blocks;
  share->loader = CursorAt(args, tiles_per_unit, first_unit, share->tile, share->k_block);
}

// Loads the first pieces of a share; the rest is fetched into L2.
__device__ __forceinline__ void LoadFirstWeights(const DecodeArgs& args, int tiles_per_unit,
                                                 int first_unit, WeightShare* share) {
#pragma unroll
  for (int p = 0; p < kStagePrefetch; ++p) {
    if (p < share->count) {
      share->words[p] = LoadWeights(At(args, share->loader));
      Advance(args, tiles_per_unit, first_unit, &share->loader);
    }
  }
  WeightCursor ahead = share->loader;
  for (int p = kStagePrefetch; p < share->count; ++p) {
    // A piece is four cache lines: one lane in eight fetches each.
    if (threadIdx.x % 8 == 0) PrefetchL2(At(args, ahead));
    Advance(args, tiles_per_unit, first_unit, &ahead);
  }
}

// First pass over one row: its ordered sums and its maxima. `norm_lane` in [0, kNormLanes).
template <NormKind kKind>
__device__ __forceinline__ void NormRow(const DecodeArgs& args, const StageBuffers& buffers,
                                        int row, int norm_lane,
                                        NormPartials<NormTraits<kKind>::kOutputs>* partials) {
  using T = NormTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr int kBatch = 5;
  const int padded = args.padded_cols;
  const float* const x_row = buffers.x + row * padded;
  const float* const y_row = T::kHasY ? buffers.y + row * padded : buffers.w1;
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
        max_bits[o] = max(max_bits[o], AbsBits(y * buffers.w2[o * padded + k]));
      }
    }
  }
  StorePartials<kOutputs>(sum_xx, sum_yy, max_bits, norm_lane / 32, norm_lane % 32, partials);
}

// Second pass: the codes of rows [first_row, first_row + kPass).
template <NormKind kKind, int kRows, int kPass, bool kPlain, int kThreads>
__device__ __forceinline__ void QuantizeRows(
    const DecodeArgs& args, const StageBuffers& buffers, int first_row,
    const StageScales<NormTraits<kKind>::kOutputs, kRows>& scales,
    int32_t (&code_sums)[NormTraits<kKind>::kOutputs][kRows]) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  const int padded = args.padded_cols;
  int32_t sums[kOutputs][kPass] = {};
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * kThreads) {
    uint32_t codes[kOutputs][kPass];
    float4 y[kPass];
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      const float* const from = NormTraits<kKind>::kHasY ? buffers.y : buffers.x;
      y[r] = *reinterpret_cast<const float4*>(from + (first_row + r) * padded + k);
      if constexpr (NormTraits<kKind>::kHasW1) {
        const float4 w = *reinterpret_cast<const float4*>(buffers.w1 + k);
        y[r] = make_float4(y[r].x * w.x, y[r].y * w.y, y[r].z * w.z, y[r].w * w.w);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float4 w = *reinterpret_cast<const float4*>(buffers.w2 + o * padded + k);
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        codes[o][r] =
            QuantizeQuad<kPlain>(y[r], w, scales.code[o][first_row + r].scale, &sums[o][r]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        const int at = (o * kRows + first_row + r) * (padded + kCodePadding) + k;
        *reinterpret_cast<uint32_t*>(buffers.codes + at) = codes[o][r];
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

// The codes of all rows, from what NormRow left of them and the block has synchronized on; leaves
// the block synchronized.
template <NormKind kKind, int kRows, int kThreads>
__device__ __forceinline__ void Quantize(
    const DecodeArgs& args, const StageBuffers& buffers,
    const NormPartials<NormTraits<kKind>::kOutputs> (&partials)[kRows],
    StageScales<NormTraits<kKind>::kOutputs, kRows>* scales,
    int32_t (&code_sums)[NormTraits<kKind>::kOutputs][kRows]) {
  using T = NormTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  const int thread = threadIdx.x;
  if (thread < kOutputs * kRows) {
    scales->code[thread % kOutputs][thread / kOutputs] = CodeScaleOf<T::kOneNorm>(
        partials[thread / kOutputs], thread % kOutputs, static_cast<float>(args.cols), args.eps);
  }
  __syncthreads();
  bool plain = true;
#pragma unroll
  for (int i = 0; i < kOutputs * kRows; ++i) {
    plain = plain && scales->code[i % kOutputs][i / kOutputs].plain;
  }
  constexpr int kPass = kRows < 2 ? kRows : 2;
#pragma unroll 1
  for (int row = 0; row < kRows; row += kPass) {
    if (plain) {
      QuantizeRows<kKind, kRows, kPass, true, kThreads>(args, buffers, row, *scales, code_sums);
    } else {
      QuantizeRows<kKind, kRows, kPass, false, kThreads>(args, buffers, row, *scales, code_sums);
    }
  }
  __syncthreads();
}

// Sums of a tile: those of each k-step's first 16 columns, and those of its others times 16. So a
// word's fragments are masks of it without a shift.
struct TileSums {
  int32_t low[4] = {};
  int32_t high[4] = {};
};

// Multiplies the words of two k-steps with their codes, whose four chunks of 16 columns come in the
// order of ChunkOf.
__device__ __forceinline__ void MultiplySteps(uint32_t first, uint32_t second,
                                              const uint32_t (&codes)[4], TileSums* sums) {
  Mma(sums->low, first & 0x03030303u, first & 0x0c0c0c0cu, second & 0x03030303u,
      second & 0x0c0c0c0cu, codes[0], codes[1]);
  Mma(sums->high, first & 0x30303030u, first & 0xc0c0c0c0u, second & 0x30303030u,
      second & 0xc0c0c0c0u, codes[2], codes[3]);
}

__device__ __forceinline__ int ChunkOf(int matrix) { return matrix % 2 * 2 + matrix / 2; }

// Adds a warp's sums of a tile of 2 * `half` slots to the block's.
template <int kRows>
__device__ __forceinline__ void Flush(const TileSums& tile, int half, int32_t* sums) {
  const int lane = threadIdx.x % 32;
  const bool second_block = half < kTileRows / 2 && lane >= 16;
  int32_t acc[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = tile.low[i] + (tile.high[i] >> 4);
  // Column n of the results is row n % kRows of the codes, and where tiles are halved of k-block
  // n / kRows % 2; a lane has columns 2 * (lane % 4) and the next.
  const int slot = (lane / 4) & (half - 1);
  if constexpr (kRows == 1) {
    if (lane % 4 == 0) {
      atomicAdd(&sums[slot], second_block ? acc[1] : acc[0]);
      atomicAdd(&sums[slot + half], second_block ? acc[3] : acc[2]);
    }
  } else {
    static_assert(kRows == 2);
    if (lane % 4 == (second_block ? 1 : 0)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        atomicAdd(&sums[slot * kRows + row], acc[row]);
        atomicAdd(&sums[(slot + half) * kRows + row], acc[2 + row]);
      }
    }
  }
}

// Multiplies a warp's share and adds it to buffers.sums.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void Multiply(const DecodeArgs& args, const StageBuffers& buffers,
                                         int first_unit, WeightShare* share) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  constexpr int kPerUnit = TilesPerUnit(kKind);
  const int lane = threadIdx.x % 32;
  const int code_stride = args.padded_cols + kCodePadding;
  const uint32_t own_codes =
      SharedAddress(buffers.codes) + lane % kRows * code_stride + ChunkOf(lane / 8) * 16;
  int tile = share->tile;
  int k_block = share->k_block;
  TileSums sums;
  for (int base = 0; base < share->count; base += kStagePrefetch) {
#pragma unroll
    for (int p = 0; p < kStagePrefetch; ++p) {
      const int piece = base + p;
      if (piece >= share->count) break;
      const uint4 current = share->words[p];
      if (piece + kStagePrefetch < share->count) {
        share->words[p] = LoadWeights(At(args, share->loader));
        Advance(args, kPerUnit, first_unit, &share->loader);
      }
      const int output = kOutputs == 1 ? 0 : tile % kOutputs;
      const uint32_t at = own_codes + output * kRows * code_stride + k_block * kColumnBlock;
      uint32_t b[2][4];
      LoadMatrix4(b[0], at);
      LoadMatrix4(b[1], at + 64);
      MultiplySteps(current.x, current.y, b[0], &sums);
      MultiplySteps(current.z, current.w, b[1], &sums);
      if (++k_block == args.weights.k_blocks || piece + 1 == share->count) {
        Flush<kRows>(sums, kTileRows / 2, buffers.sums + tile * kTileRows * kRows);
        sums = TileSums();
        k_block = 0;
        ++tile;
      }
    }
  }
}

// The epilogue's work of one thread: a channel (kRecurrence) or a pair of slots of one row. Tiles
// of 2^log_rows slots.
template <Epilogue kEpilogue, int kRows>
struct EpilogueItem {
  static constexpr bool kRecurrence = kEpilogue == Epilogue::kRecurrence;

  int row;
  int own;     // channel or pair within the block's units
  int column;  // the first that it writes of its row
  bool owned;

  static __host__ __device__ constexpr int PerUnit(int log_rows) {
    return 1 << (kRecurrence ? log_rows : log_rows - 1);
  }

  __device__ __forceinline__ EpilogueItem(const DecodeArgs& args, int first_unit, int units,
                                          int log_rows, int32_t num_rows)
      : row(threadIdx.x % kRows), own(threadIdx.x / kRows) {
    column = kEpilogue == Epilogue::kSwiGlu
                 ? first_unit * PerUnit(log_rows) + own
                 : (first_unit << log_rows) + (kRecurrence ? own : 2 * own);
    owned = row < num_rows && own < units * PerUnit(log_rows) &&
            column < (kRecurrence ? args.cols : args.ld);
  }
};

// What an epilogue thread reads from memory, early enough to be there when the sums are. It was
// written by the stage before the previous one or earlier.
struct EpilogueInput {
  float state = 0.0f;
  float lower_bound = 0.0f;
  float g_norm = 0.0f;
  float2 residual = {0.0f, 0.0f};
};

// `slot`: of the item's row, when it is owned and the epilogue is kRecurrence.
template <Epilogue kEpilogue, int kRows>
__device__ __forceinline__ EpilogueInput LoadEpilogueInput(
    const DecodeArgs& args, const EpilogueItem<kEpilogue, kRows>& item, int32_t slot) {
  EpilogueInput input;
  if (!item.owned) return input;
  if constexpr (kEpilogue == Epilogue::kRecurrence) {
    input.lower_bound = args.lower_bound[item.column];
    input.g_norm = args.g_norm[item.column];
    input.state = __ldcg(args.states + slot * args.state_stride + item.column);
  }
  if constexpr (kEpilogue == Epilogue::kResidual) {
    input.residual =
        __ldcg(reinterpret_cast<const float2*>(args.out + item.row * args.ld + item.column));
  }
  return input;
}

// What an item writes: `values` at its column (kSwiGlu, kRecurrence: one), and for kRecurrence the
// gated value and the new state.
struct EpilogueOutput {
  float2 values;
  float gated;
  float state;
};

// Turns the block's sums into what the stage writes, for an item that is owned.
template <NormKind kKind, Epilogue kEpilogue, int kRows>
__device__ __forceinline__ EpilogueOutput
Finish(const DecodeArgs& args, const StageBuffers& buffers,
       const StageScales<NormTraits<kKind>::kOutputs, kRows>& scales,
       const int32_t (&code_sums)[NormTraits<kKind>::kOutputs][kRows],
       const EpilogueItem<kEpilogue, kRows>& item, int log_rows, const EpilogueInput& input) {
  const int half = 1 << (log_rows - 1);  // from a pair's first slot to its second
  EpilogueOutput output;
  if constexpr (kEpilogue == Epilogue::kRecurrence) {
    // Row `own` of its tile sits in slot own / 2, or that and `half` with its sums times four.
    const int in_tile = item.own & (2 * half - 1);
    const int slot = in_tile / 2 + in_tile % 2 * half;
    const int own_sums = (item.own >> log_rows) * 3;
    float values[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const int32_t sum = buffers.sums[(((own_sums + m) << log_rows) + slot) * kRows + item.row];
      const float factor = scales.row[m][item.row].out * args.weights.scale[m];
      values[m] =
          static_cast<float>((in_tile % 2 == 0 ? sum : sum >> 2) - code_sums[m][item.row]) * factor;
    }
    // Recur and GateOutput of numerics.h, the two gates' divisions side by side.
    float gates[2] = {1.0f, values[0]};
    const float divisors[2] = {1.0f + Exp(-values[1]), 1.0f + Exp(-values[0])};
    DivideBatch(gates, divisors, gates);
    const float forget = fmaf(1.0f - input.lower_bound, gates[0], input.lower_bound);
    const float next[1] = {fmaf(forget, input.state, gates[1] * (1.0f - forget))};
    float silu[1];
    SiluBatch(next, silu);
    output.values = make_float2(values[2], 0.0f);
    output.gated = (values[2] * input.g_norm) * silu[0];
    output.state = next[0];
  } else {
    const int slot = item.own / half * 2 * half + (item.own & (half - 1));
    const int32_t* const sums = buffers.sums + slot * kRows + item.row;
    const RowMeta meta = {scales.row[0][item.row].out, code_sums[0][item.row]};
    output.values = TokenValues<kEpilogue>(sums[0], sums[half * kRows], meta, args.weights.scale[0],
                                           input.residual);
  }
  return output;
}

// Writes an item's output to where args say.
template <Epilogue kEpilogue, int kRows>
__device__ __forceinline__ void StoreOutput(const DecodeArgs& args,
                                            const EpilogueItem<kEpilogue, kRows>& item,
                                            int32_t slot, const EpilogueOutput& output) {
  float* const out = args.out + item.row * args.ld + item.column;
  if constexpr (kEpilogue == Epilogue::kRecurrence) {
    args.states[slot * args.state_stride + item.column] = output.state;
    *out = output.values.x;
    args.gated[item.row * args.ld + item.column] = output.gated;
  } else if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    *out = output.values.x;
  } else {
    *reinterpret_cast<float2*>(out) = output.values;
  }
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DECODE_STAGE_CUH_
