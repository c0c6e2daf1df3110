// The recurrence over chunks of tokens: sequential in the tokens of a row, parallel over channels
// and rows.
//
// Long rows: a block owns 8 channels (a 32-byte sector) of one row. Its warps form the gates of 256
// tokens at a time in parallel, eight threads then chain the 256 states (one fma each), and all
// warps form the outputs while the next tokens' values are already on their way. Several blocks
// share a multiprocessor, so that one computes while another chains; where there are too few of
// them for that, a warp of each block chains a tile while its other warps have the next and the
// last.
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
constexpr int kThreads = 256;
constexpr int kTokenGroups = kThreads / kChannels;
constexpr int kTokensPerThread = 8;
constexpr int kTileTokens = kTokenGroups * kTokensPerThread;
constexpr int kChain = 16;  // states chained between accesses to shared memory

// The values of a thread's tokens in one tile.
struct TileValues {
  float forget[kTokensPerThread];
  float input[kTokensPerThread];
  float g[kTokensPerThread];
};

__device__ __forceinline__ void LoadTile(const ScanArgs& args, int32_t first_token,
                                         int32_t num_tokens, int32_t channel, bool in_range,
                                         TileValues* values) {
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const bool valid = in_range && i < num_tokens;
    const int64_t at = int64_t{first_token + i} * args.ld + channel;
    values->forget[i] = valid ? args.forget[at] : 0.0f;
    values->input[i] = valid ? args.input[at] : 0.0f;
    values->g[i] = valid ? args.g[at] : 0.0f;
  }
}

// Chains the states of a channel through a tile and leaves each in `keep`; returns the last one.
__device__ __forceinline__ float Chain(float (&keep)[kTileTokens][kChannels],
                                       const float (&add)[kTileTokens][kChannels], int lane,
                                       int32_t tokens, float state) {
  int32_t n = 0;
  for (; n + kChain <= tokens; n += kChain) {
    float f[kChain];
    float i[kChain];
#pragma unroll
    for (int j = 0; j < kChain; ++j) {
      f[j] = keep[n + j][lane];
      i[j] = add[n + j][lane];
    }
    // A register for each state: one that is stored and overwritten would wait for the store.
#pragma unroll
    for (int j = 0; j < kChain; ++j) f[j] = fmaf(f[j], j == 0 ? state : f[j - 1], i[j]);
#pragma unroll
    for (int j = 0; j < kChain; ++j) keep[n + j][lane] = f[j];
    state = f[kChain - 1];
  }
  for (; n < tokens; ++n) {
    state = fmaf(keep[n][lane], state, add[n][lane]);
    keep[n][lane] = state;
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

__global__ void __launch_bounds__(kThreads) ShortScanKernel(const ScanArgs args) {
  constexpr int kBatch = 8;  // tokens whose values are in flight together
  WaitForPrevious();
  AllowNext();
  if (static_cast<int32_t>(blockIdx.y) >= args.counts->short_rows) return;
  const RowInput row = args.rows[blockIdx.y];
  const int32_t channel = blockIdx.x * kThreads + threadIdx.x;
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

__global__ void __launch_bounds__(kThreads) ScanKernel(const ScanArgs args) {
  // Recur (numerics.h) in two parts: f and i of every token, then state = fma(f, state, i).
  __shared__ float keep[kTileTokens][kChannels];  // f; then the states
  __shared__ float add[kTileTokens][kChannels];   // silu(i) * (1 - f)

  WaitForPrevious();
  AllowNext();
  const int32_t short_rows = args.counts->short_rows;
  if (static_cast<int32_t>(blockIdx.y) >= args.counts->rows - short_rows) return;
  const RowInput row = args.rows[short_rows + blockIdx.y];
  const int lane = threadIdx.x % kChannels;
  const bool chains = threadIdx.x < kChannels;
  const int32_t channel = blockIdx.x * kChannels + lane;
  const bool in_range = channel < args.dim;
  const float lower_bound = in_range ? args.lower_bound[channel] : 0.0f;
  const float one_minus_lower_bound = 1.0f - lower_bound;
  const float g_norm = in_range ? args.g_norm[channel] : 0.0f;
  float* const state_at = args.states + row.slot * args.state_stride + channel;
  float state = chains && in_range ? *state_at : 0.0f;

  const int own = threadIdx.x / kChannels * kTokensPerThread;  // first token of a tile
  TileValues values;
  LoadTile(args, row.first_token + own, row.num_tokens - own, channel, in_range, &values);
  for (int32_t first = 0; first < row.num_tokens; first += kTileTokens) {
    float g[kTokensPerThread];
    float sigmoid[kTokensPerThread];
    float silu[kTokensPerThread];
    SigmoidBatch(values.forget, sigmoid);
    SiluBatch(values.input, silu);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const float f = fmaf(one_minus_lower_bound, sigmoid[i], lower_bound);
      keep[own + i][lane] = f;
      add[own + i][lane] = silu[i] * (1.0f - f);
      g[i] = values.g[i];
    }
    const int32_t next = first + kTileTokens + own;
    LoadTile(args, row.first_token + next, row.num_tokens - next, channel, in_range, &values);
    __syncthreads();
    const int32_t tile_tokens = min(kTileTokens, row.num_tokens - first);
    if (chains) state = Chain(keep, add, lane, tile_tokens, state);
    __syncthreads();
    const int32_t own_tokens = tile_tokens - own;
    float states[kTokensPerThread];
    float silu_state[kTokensPerThread];
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) states[i] = keep[own + i][lane];
    SiluBatch(states, silu_state);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      if (in_range && i < own_tokens) {
        // GateOutput of numerics.h.
        args.y[int64_t{row.first_token + first + own + i} * args.ld + channel] =
            (g[i] * g_norm) * silu_state[i];
      }
    }
  }
  if (chains && in_range) *state_at = state;
}

// Of PipedScanKernel: the last warp chains.
constexpr int kPipedThreads = kThreads + 32;

// Chain, with the values of the next states read while these are formed.
__device__ __forceinline__ float ChainReadingAhead(float (&keep)[kTileTokens][kChannels],
                                                   const float (&add)[kTileTokens][kChannels],
                                                   int lane, int32_t tokens, float state) {
  float f[kChain];
  float i[kChain];
  int32_t n = 0;
  if (kChain <= tokens) {
#pragma unroll
    for (int j = 0; j < kChain; ++j) {
      f[j] = keep[j][lane];
      i[j] = add[j][lane];
    }
  }
  for (; n + kChain <= tokens; n += kChain) {
    float next_f[kChain];
    float next_i[kChain];
    const bool more = n + 2 * kChain <= tokens;
    const int32_t next = more ? n + kChain : n;
#pragma unroll
    for (int j = 0; j < kChain; ++j) {
      next_f[j] = keep[next + j][lane];
      next_i[j] = add[next + j][lane];
    }
#pragma unroll
    for (int j = 0; j < kChain; ++j) f[j] = fmaf(f[j], j == 0 ? state : f[j - 1], i[j]);
    state = f[kChain - 1];
#pragma unroll
    for (int j = 0; j < kChain; ++j) keep[n + j][lane] = f[j];
#pragma unroll
    for (int j = 0; j < kChain; ++j) {
      f[j] = next_f[j];
      i[j] = next_i[j];
    }
  }
  for (; n < tokens; ++n) {
    state = fmaf(keep[n][lane], state, add[n][lane]);
    keep[n][lane] = state;
  }
  return state;
}

// The chain of one tile beside the gates of the next and the outputs of the last.
__global__ void __launch_bounds__(kPipedThreads) PipedScanKernel(const ScanArgs args) {
  // Recur (numerics.h) in two parts: f and i of every token, then state = fma(f, state, i).
  __shared__ float keep[2][kTileTokens][kChannels];  // f; then the states
  __shared__ float add[2][kTileTokens][kChannels];   // silu(i) * (1 - f)

  WaitForPrevious();
  AllowNext();
  const int32_t short_rows = args.counts->short_rows;
  if (static_cast<int32_t>(blockIdx.y) >= args.counts->rows - short_rows) return;
  const RowInput row = args.rows[short_rows + blockIdx.y];
  const int32_t tiles = static_cast<int32_t>(CeilDiv(row.num_tokens, kTileTokens));
  const int lane = threadIdx.x % kChannels;
  const int32_t channel = blockIdx.x * kChannels + lane;
  const bool in_range = channel < args.dim;

  if (threadIdx.x >= kThreads) {
    // The chaining warp, of which eight lanes have a channel each.
    const bool chains = threadIdx.x < kThreads + kChannels;
    float* const state_at = args.states + row.slot * args.state_stride + channel;
    float state = chains && in_range ? *state_at : 0.0f;
    __syncthreads();
    for (int32_t tile = 0; tile <= tiles; ++tile) {
      const int32_t tokens = min(kTileTokens, row.num_tokens - tile * kTileTokens);
      if (chains && tile < tiles) {
        state = ChainReadingAhead(keep[tile % 2], add[tile % 2], lane, tokens, state);
      }
      __syncthreads();
    }
    if (chains && in_range) *state_at = state;
    return;
  }

  const float lower_bound = in_range ? args.lower_bound[channel] : 0.0f;
  const float one_minus_lower_bound = 1.0f - lower_bound;
  const float g_norm = in_range ? args.g_norm[channel] : 0.0f;
  const int own = threadIdx.x / kChannels * kTokensPerThread;  // first token of a tile
  TileValues values;
  float g[2][kTokensPerThread];  // of the tile that is chained, and of the one before
  const auto load = [&](int32_t tile) {
    const int32_t first = tile * kTileTokens + own;
    LoadTile(args, row.first_token + first, row.num_tokens - first, channel, in_range, &values);
  };
  // The gates of the tile in `values`, which then takes the next one.
  const auto form_gates = [&](int32_t tile) {
    float sigmoid[kTokensPerThread];
    float silu[kTokensPerThread];
    SigmoidBatch(values.forget, sigmoid);
    SiluBatch(values.input, silu);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const float f = fmaf(one_minus_lower_bound, sigmoid[i], lower_bound);
      keep[tile % 2][own + i][lane] = f;
      add[tile % 2][own + i][lane] = silu[i] * (1.0f - f);
      g[1][i] = g[0][i];
      g[0][i] = values.g[i];
    }
    load(tile + 1);
  };
  load(0);
  form_gates(0);
  __syncthreads();
  for (int32_t tile = 0; tile <= tiles; ++tile) {
    // Threads write in `keep` and read of it only their own tokens, so that what the next tile
    // overwrites has been read.
    if (tile > 0) {
      const int32_t first = (tile - 1) * kTileTokens + own;
      float states[kTokensPerThread];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) states[i] = keep[(tile - 1) % 2][own + i][lane];
      SiluBatch(states, states);
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        if (in_range && first + i < row.num_tokens) {
          // GateOutput of numerics.h.
          args.y[int64_t{row.first_token + first + i} * args.ld + channel] =
              ((tile < tiles ? g[1][i] : g[0][i]) * g_norm) * states[i];
        }
      }
    }
    if (tile + 1 < tiles) form_gates(tile + 1);
    __syncthreads();
  }
}

}  // namespace

cudaError_t LaunchScan(const ScanArgs& args, int32_t max_short_rows, int32_t max_long_rows,
                       const LaunchContext& context) {
  if (max_short_rows > 0) {
    const dim3 grid(static_cast<uint32_t>(CeilDiv(args.dim, kThreads)), max_short_rows);
    const cudaError_t error = Launch<ShortScanKernel>(context, grid, dim3(kThreads), 0, args);
    if (error != cudaSuccess || max_long_rows == 0) return error;
  }
  const dim3 grid(static_cast<uint32_t>(CeilDiv(args.dim, kChannels)), max_long_rows);
  // As measured (decision 0208): where two blocks or fewer share a multiprocessor.
  if (context.hopper && int64_t{grid.x} * grid.y <= int64_t{2} * context.num_sms) {
    return Launch<PipedScanKernel>(context, grid, dim3(kPipedThreads), 0, args);
  }
  return Launch<ScanKernel>(context, grid, dim3(kThreads), 0, args);
}

}  // namespace mmfree::cuda
