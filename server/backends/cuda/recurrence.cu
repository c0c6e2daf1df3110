// The recurrence over chunks of tokens: sequential in the tokens of a row, parallel over channels
// and rows.
//
// Long rows: a block owns 8 channels (a 32-byte sector) of one row. In tiles of 256 tokens, sixteen
// of its warps form the gates of one tile in parallel and the outputs of the one two before, while
// eight threads of another warp chain the states of the tile between (one fma each); the values of
// the next tile are on their way.
//
// Short rows (at most kShortRowTokens, decoding rows beside prompts above all) would leave most of
// such a tile empty: there a thread takes one channel of one row through all its tokens, and leaves
// the states between them where a rewindable row keeps them.
#include <cuda_runtime.h>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {
namespace {

constexpr int kChannels = 8;
constexpr int kGateThreads = 512;  // form gates and outputs
constexpr int kTokenGroups = kGateThreads / kChannels;
constexpr int kTokensPerThread = 4;
constexpr int kTileTokens = kTokenGroups * kTokensPerThread;
constexpr int kChain = 8;  // states chained between accesses to shared memory
// Floats of a channel in a tile: tokens, and as many more that a warp's accesses (a token each of
// four groups, of eight channels) and those of the chaining threads (16 bytes each) meet no bank
// twice.
constexpr int kTileStride = kTileTokens + 4;

// Recur (numerics.h) in two parts, of a tile of tokens: f and i of every token, then
// state = fma(f, state, i).
struct ScanTile {
  float keep[kChannels][kTileStride];  // f; then the states
  float add[kChannels][kTileStride];   // silu(i) * (1 - f)
};

// A thread's tokens of a tile: one of each kTokenGroups.
__device__ __forceinline__ int OwnToken(int i) {
  return i * kTokenGroups + static_cast<int>(threadIdx.x) / kChannels;
}

// What the gates of a thread's tokens in one tile are formed from.
struct TileValues {
  float forget[kTokensPerThread];
  float input[kTokensPerThread];
};

// Of the tile that begins at a row's token `first`.
__device__ __forceinline__ void LoadTile(const ScanArgs& args, const RowInput& row, int32_t first,
                                         int32_t channel, bool in_range, TileValues* values) {
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int32_t token = first + OwnToken(i);
    const bool valid = in_range && token < row.num_tokens;
    const int64_t at = int64_t{row.first_token + token} * args.ld + channel;
    // Ones for those that do not exist: zeros would take DivideBatch off its quick path.
    values->forget[i] = valid ? args.forget[at] : 1.0f;
    values->input[i] = valid ? args.input[at] : 1.0f;
  }
}

// What their outputs are formed from, of the same tile.
__device__ __forceinline__ void LoadOutputGates(const ScanArgs& args, const RowInput& row,
                                                int32_t first, int32_t channel, bool in_range,
                                                float (&g)[kTokensPerThread]) {
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int32_t token = first + OwnToken(i);
    const bool valid = in_range && token < row.num_tokens;
    g[i] = valid ? args.g[int64_t{row.first_token + token} * args.ld + channel] : 0.0f;
  }
}

// What depends on a channel alone.
struct ScanChannel {
  float lower_bound = 0.0f;
  float g_norm = 0.0f;

  __device__ __forceinline__ ScanChannel(const ScanArgs& args, int32_t channel, bool in_range) {
    if (!in_range) return;
    lower_bound = args.lower_bound[channel];
    g_norm = args.g_norm[channel];
  }
};

// f and i of a thread's tokens.
__device__ __forceinline__ void FormGates(const TileValues& values, const ScanChannel& channel,
                                          int lane, ScanTile* tile) {
  float sigmoid[kTokensPerThread];
  float silu[kTokensPerThread];
  SigmoidBatch(values.forget, sigmoid);
  SiluBatch(values.input, silu);
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const float f = fmaf(1.0f - channel.lower_bound, sigmoid[i], channel.lower_bound);
    tile->keep[lane][OwnToken(i)] = f;
    tile->add[lane][OwnToken(i)] = silu[i] * (1.0f - f);
  }
}

// Outputs of a thread's tokens (GateOutput of numerics.h), of a tile that begins at the row's token
// `first`.
__device__ __forceinline__ void StoreOutputs(const ScanArgs& args, const RowInput& row,
                                             int32_t first, int32_t at_channel, bool in_range,
                                             const ScanChannel& channel, int lane,
                                             const ScanTile& tile,
                                             const float (&g)[kTokensPerThread]) {
  float states[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) states[i] = tile.keep[lane][OwnToken(i)];
  SiluBatch(states, states);
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int32_t token = first + OwnToken(i);
    if (in_range && token < row.num_tokens) {
      args.y[int64_t{row.first_token + token} * args.ld + at_channel] =
          (g[i] * channel.g_norm) * states[i];
    }
  }
}

__device__ __forceinline__ void LoadChain(const float* from, float (&to)[kChain]) {
#pragma unroll
  for (int j = 0; j < kChain; j += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(from + j);
    to[j] = quad.x;
    to[j + 1] = quad.y;
    to[j + 2] = quad.z;
    to[j + 3] = quad.w;
  }
}

// Chains the states of channel `lane` through the first `tokens` of a tile and leaves each in
// `keep`; returns the last one. The next values are read while states are formed.
__device__ __forceinline__ float Chain(ScanTile* tile, int lane, int32_t tokens, float state) {
  float* const keep = tile->keep[lane];
  const float* const add = tile->add[lane];
  float f[kChain];
  float i[kChain];
  LoadChain(keep, f);
  LoadChain(add, i);
  int32_t n = 0;
#pragma unroll 2
  for (; n + kChain <= tokens; n += kChain) {
    float next_f[kChain];
    float next_i[kChain];
    const int32_t next = n + kChain < kTileTokens ? n + kChain : n;
    LoadChain(keep + next, next_f);
    LoadChain(add + next, next_i);
    // A register for each state: one that is stored and overwritten would wait for the store.
#pragma unroll
    for (int j = 0; j < kChain; ++j) f[j] = fmaf(f[j], j == 0 ? state : f[j - 1], i[j]);
    state = f[kChain - 1];
#pragma unroll
    for (int j = 0; j < kChain; j += 4) {
      *reinterpret_cast<float4*>(keep + n + j) = make_float4(f[j], f[j + 1], f[j + 2], f[j + 3]);
    }
#pragma unroll
    for (int j = 0; j < kChain; ++j) {
      f[j] = next_f[j];
      i[j] = next_i[j];
    }
  }
  for (; n < tokens; ++n) {
    state = fmaf(keep[n], state, add[n]);
    keep[n] = state;
  }
  return state;
}

// Advances `state` through kCount tokens from `at` on, of which `num_tokens` exist; the values are
// read before anything is written. kept: where the state after the first one goes and, a stride
// apart, those after the others but the last that exists; null: nowhere.
template <int kCount>
__device__ __forceinline__ float ShortTokens(const ScanArgs& args, int64_t at, int32_t num_tokens,
                                             float lower_bound, float g_norm, float state,
                                             float* kept) {
  float forget[kCount];
  float input[kCount];
  float g[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool valid = i < num_tokens;
    const int64_t from = at + i * args.ld;
    // Ones for those that do not exist: zeros would take DivideBatch off its quick path.
    forget[i] = valid ? args.forget[from] : 1.0f;
    input[i] = valid ? args.input[from] : 1.0f;
    g[i] = valid ? args.g[from] : 1.0f;
  }
  SigmoidBatch(forget, forget);
  SiluBatch(input, input);
  float states[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // Recur of numerics.h.
    const float f = fmaf(1.0f - lower_bound, forget[i], lower_bound);
    if (i < num_tokens) state = fmaf(f, state, input[i] * (1.0f - f));
    states[i] = state;
    if (kept != nullptr && i + 1 < num_tokens) kept[i * args.state_stride] = state;
  }
  SiluBatch(states, states);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // GateOutput of numerics.h.
    if (i < num_tokens) args.y[at + i * args.ld] = (g[i] * g_norm) * states[i];
  }
  return state;
}

constexpr int kShortThreads = 256;

__global__ void __launch_bounds__(kShortThreads) ShortScanKernel(const ScanArgs args) {
  constexpr int kBatch = 8;  // tokens whose values are in flight together
  WaitForPrevious();
  AllowNext();
  if (static_cast<int32_t>(blockIdx.y) >= args.counts->short_rows) return;
  const RowInput row = args.rows[blockIdx.y];
  const int32_t channel = blockIdx.x * kShortThreads + threadIdx.x;
  if (channel >= args.dim) return;
  const float lower_bound = args.lower_bound[channel];
  const float g_norm = args.g_norm[channel];
  float* const state_at = args.states + row.slot * args.state_stride + channel;
  float state = *state_at;
  float* kept = row.kept < 0 ? nullptr : args.kept + row.kept * args.state_stride + channel;
  int64_t at = int64_t{row.first_token} * args.ld + channel;
  int32_t left = row.num_tokens;
  for (; left > 1; left -= kBatch, at += kBatch * args.ld) {
    state = ShortTokens<kBatch>(args, at, left, lower_bound, g_norm, state, kept);
    if (kept != nullptr) kept += kBatch * args.state_stride;
  }
  if (left == 1) state = ShortTokens<1>(args, at, left, lower_bound, g_norm, state, nullptr);
  *state_at = state;
}

// The last warp chains.
constexpr int kScanThreads = kGateThreads + 32;

// The chain of one tile beside the gates of the next and the outputs of the last.
template <int kBlocksPerSm>
__global__ void __launch_bounds__(kScanThreads, kBlocksPerSm) ScanKernel(const ScanArgs args) {
  __shared__ __align__(16) ScanTile tiles[2];

  WaitForPrevious();
  AllowNext();
  const int32_t short_rows = args.counts->short_rows;
  if (static_cast<int32_t>(blockIdx.y) >= args.counts->rows - short_rows) return;
  const RowInput row = args.rows[short_rows + blockIdx.y];
  const int32_t num_tiles = static_cast<int32_t>(CeilDiv(row.num_tokens, kTileTokens));
  const int lane = threadIdx.x % kChannels;
  const int32_t at_channel = blockIdx.x * kChannels + lane;
  const bool in_range = at_channel < args.dim;

  // Eight lanes of the last warp have a channel each to chain.
  const bool in_chain = threadIdx.x >= kGateThreads;
  const bool chains = in_chain && threadIdx.x < kGateThreads + kChannels && in_range;
  float* const state_at = args.states + row.slot * args.state_stride + at_channel;
  float state = chains ? *state_at : 0.0f;
  const ScanChannel channel(args, at_channel, in_range);
  TileValues values;
  float g[kTokensPerThread];  // of the tile whose states are next
  if (!in_chain) {
    LoadTile(args, row, 0, at_channel, in_range, &values);
    FormGates(values, channel, lane, &tiles[0]);
    LoadTile(args, row, kTileTokens, at_channel, in_range, &values);
  }
  __syncthreads();
  for (int32_t n = 0; n <= num_tiles; ++n) {
    ScanTile& tile = tiles[n % 2];
    ScanTile& other = tiles[(n + 1) % 2];  // of the tile before, then of the next
    if (in_chain) {
      const int32_t tokens = min(kTileTokens, row.num_tokens - n * kTileTokens);
      if (chains && n < num_tiles) state = Chain(&tile, lane, tokens, state);
    } else {
      // Threads write in a tile and read of it only their own tokens, so that what the next one
      // overwrites has been read.
      if (n > 0) {
        StoreOutputs(args, row, (n - 1) * kTileTokens, at_channel, in_range, channel, lane, other,
                     g);
      }
      LoadOutputGates(args, row, n * kTileTokens, at_channel, in_range, g);
      if (n + 1 < num_tiles) {
        FormGates(values, channel, lane, &other);
        LoadTile(args, row, (n + 2) * kTileTokens, at_channel, in_range, &values);
      }
    }
    __syncthreads();
  }
  if (chains) *state_at = state;
}

}  // namespace

cudaError_t LaunchScan(const ScanArgs& args, int32_t max_short_rows, int32_t max_long_rows,
                       const LaunchContext& context) {
  if (max_short_rows > 0) {
    const dim3 grid(static_cast<uint32_t>(CeilDiv(args.dim, kShortThreads)), max_short_rows);
    const cudaError_t error = Launch<ShortScanKernel>(context, grid, dim3(kShortThreads), 0, args);
    if (error != cudaSuccess || max_long_rows == 0) return error;
  }
  const dim3 grid(static_cast<uint32_t>(CeilDiv(args.dim, kChannels)), max_long_rows);
  // More registers where all blocks have a multiprocessor to themselves.
  const bool alone = int64_t{grid.x} * grid.y <= context.num_sms;
  return alone ? Launch<ScanKernel<1>>(context, grid, dim3(kScanThreads), 0, args)
               : Launch<ScanKernel<2>>(context, grid, dim3(kScanThreads), 0, args);
}

}  // namespace mmfree::cuda
