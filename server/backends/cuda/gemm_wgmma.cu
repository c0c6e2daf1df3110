// int8 x ternary product with wgmma, for many tokens (compute capability 9.0).
//
// A block computes tiles of 64 * kRowGroups slots x kTokens tokens. One thread keeps a ring of
// stages full with bulk copies (a stage is 128 columns: the tokens' codes as they lie in memory,
// and the weights'); the warpgroups turn their weights into register fragments and multiply.
// Warpgroups divide the rows or, for narrow outputs, the columns of the product; integer sums make
// any split exact. For wide steps two teams of them take tiles in turn: one multiplies while the
// other finishes (decision 0210).
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/epilogue.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"

namespace mmfree::cuda {
namespace {

// kRowGroups x kSplit warpgroups a team, each of 64 slots; kTeams of them a block. kTileNs and
// kBlockNs: see Estimate.
template <int kRowGroups_, int kSplit_, int kTeams_, int kTokens_, int kStages_, int kBlocksPerSm_,
          int kTileNs_, int kBlockNs_>
struct Tile {
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kSplit = kSplit_;
  static constexpr int kTeams = kTeams_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kTileNs = kTileNs_;
  static constexpr int kBlockNs = kBlockNs_;

  static constexpr int kTeamThreads = 128 * kRowGroups * kSplit;
  static constexpr int kConsumers = kTeamThreads * kTeams;
  // With two teams the producer is a whole warpgroup, so that its registers can go to the others.
  static constexpr bool kMovesRegisters = kTeams == 2;
  static constexpr int kThreads = kConsumers + (kMovesRegisters ? 128 : 32);
  static constexpr int kTokenBytes = kTokens * kColumnBlock;
  static constexpr int kWeightBytes = kRowGroups * kBlockBytes;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  // Sums that the two halves of a split exchange, in place of the ring.
  static constexpr int kExchangeBytes = kSplit > 1 ? kConsumers*(kTokens / 4) * 4 : 0;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = 1024 + std::max(kRingBytes, kExchangeBytes);
  // Tiles of eight tokens whose sums a warp finishes, and how many at a time.
  static constexpr int kOwnTiles = kTokens / 8 / kSplit;
  static constexpr int kBatch = std::min(kOwnTiles, kTokens > 64 ? 2 : 4);
  static_assert(kSplit == 1 || kSplit == 2);
  static_assert(kTeams == 1 || (kTeams == 2 && kSplit == 1));
  static_assert(kTokens % (8 * kSplit) == 0 && kOwnTiles % kBatch == 0);
  // Each half of a split meets the stages of its own in every round: a barrier that is waited for
  // has completed the round before.
  static_assert(kStages % kSplit == 0);
  // What setmaxnreg gives and takes (GemmWgmmaKernel) is for blocks that begin with 96 registers.
  static_assert(!kMovesRegisters || (kThreads == 640 && kBlocksPerSm == 1));
  static_assert(kStageBytes % 1024 == 0);
};

template <typename T>
struct Shared {
  uint64_t full[T::kStages];
  uint64_t empty[T::kStages];
  RowMeta meta[T::kTeams][2][T::kTokens];  // of a team's tile and its next
};

// A tile of a product: where its rows and tokens begin.
struct TilePlace {
  int first_block;  // of 64 slots
  int first_token;
  int matrix;
};
template <typename T>
__device__ __forceinline__ TilePlace PlaceOf(const GemmArgs& args, int tile) {
  const int row_tiles = (args.weights.row_blocks + T::kRowGroups - 1) / T::kRowGroups;
  const int token_tiles = (args.max_tokens + T::kTokens - 1) / T::kTokens;
  const int column = tile / row_tiles;
  return {tile % row_tiles * T::kRowGroups, column % token_tiles * T::kTokens,
          column / token_tiles};
}
template <typename T>
__host__ __device__ __forceinline__ int TilesOf(const GemmArgs& args) {
  return static_cast<int>(CeilDiv(args.weights.row_blocks, T::kRowGroups) *
                          CeilDiv(args.max_tokens, T::kTokens) * args.weights.matrices);
}

// A stage of the ring, and the parity that its barriers have in this round.
template <typename T>
struct RingPlace {
  int stage;
  uint32_t parity;

  template <int kBy>
  __device__ __forceinline__ void Advance() {
    stage += kBy;
    if (stage < T::kStages) return;
    stage -= T::kStages;
    parity ^= 1;
  }
  __device__ __forceinline__ void Skip(int stages) {
    const int to = stage + stages;
    stage = to % T::kStages;
    parity ^= to / T::kStages % 2;
  }
};

// Keeps the ring full, over all of a block's tiles. Weights do not depend on the previous kernel,
// so those of the first stages are on their way before it has ended. One thread; small tiles take
// no longer than it takes to begin their copies.
template <typename T>
__device__ __forceinline__ void Produce(const GemmArgs& args, int tiles, uint32_t ring,
                                        const Shared<T>& shared) {
  const int k_blocks = args.weights.k_blocks;
  const int64_t block_stride = int64_t{args.stride} * kColumnBlock;
  const int64_t row_stride = int64_t{k_blocks} * kBlockBytes;
  int row_blocks = 0;
  const uint8_t* weights = nullptr;  // of the next stage
  const int8_t* q = nullptr;
  const auto go_to = [&](int tile) {
    const TilePlace place = PlaceOf<T>(args, tile);
    row_blocks = args.weights.row_blocks - place.first_block;
    weights = args.weights.codes +
              (int64_t{place.matrix} * args.weights.row_blocks + place.first_block) * row_stride;
    q = args.q +
        (int64_t{place.matrix} * k_blocks * args.stride + place.first_token) * kColumnBlock;
  };
  const auto load_weights = [&](int stage) {
    const uint32_t full = SharedAddress(&shared.full[stage]);
    const uint32_t to = ring + stage * T::kStageBytes + T::kTokenBytes;
    BarrierArriveExpect(full, T::kTokenBytes + min(T::kRowGroups, row_blocks) * kBlockBytes);
#pragma unroll
    for (int block = 0; block < T::kRowGroups; ++block) {
      if (block > 0 && block >= row_blocks) break;
      BulkCopy(to + block * kBlockBytes, weights + block * row_stride, kBlockBytes, full);
    }
    weights += kBlockBytes;
  };
  const auto load_tokens = [&](int stage) {
    BulkCopy(ring + stage * T::kStageBytes, q, T::kTokenBytes, SharedAddress(&shared.full[stage]));
    q += block_stride;
  };
  go_to(blockIdx.x);
  const int first = min(T::kStages, k_blocks);
  for (int stage = 0; stage < first; ++stage) load_weights(stage);
  WaitForPrevious();
  for (int stage = 0; stage < first; ++stage) load_tokens(stage);
  // In the first round no stage is waited for: that of a new barrier has the parity 1.
  RingPlace<T> at = {first - 1, 1};
  at.template Advance<1>();
  int k_block = first;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, k_block = 0) {
    if (tile != static_cast<int>(blockIdx.x)) go_to(tile);
    for (; k_block < k_blocks; ++k_block) {
      BarrierWait(SharedAddress(&shared.empty[at.stage]), at.parity);
      load_weights(at.stage);
      load_tokens(at.stage);
      at.template Advance<1>();
    }
  }
}

// A consumer's place in its block.
struct Place {
  int team;
  int thread;  // of the team
  int warp;    // of the team
  int lane;
  int row_group;
  int split;
};

// Named barriers of a block; of each team one.
[[maybe_unused]] constexpr int kTeamBarrier = 1;
[[maybe_unused]] constexpr int kTurnBarrier = 3;

// Two teams take a block's tiles in turn, and multiply in turn: while one finishes its sums the
// other has the tensor cores to itself. Each thread of a team awaits and passes the turn.
template <typename T>
__device__ __forceinline__ void AwaitTurn(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(kTurnBarrier + team), "n"(T::kConsumers) : "memory");
}
template <typename T>
__device__ __forceinline__ void PassTurn(int team) {
  const int other = 1 - team;
  asm volatile("bar.arrive %0, %1;" ::"r"(kTurnBarrier + other), "n"(T::kConsumers) : "memory");
}
// Until all threads of a team are here.
template <typename T>
__device__ __forceinline__ void SyncTeam(int team) {
  if constexpr (T::kTeams == 1) {
    asm volatile("bar.sync %0, %1;" ::"n"(kTeamBarrier), "n"(T::kTeamThreads) : "memory");
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(kTeamBarrier + team), "n"(T::kTeamThreads) : "memory");
  }
}

// Lets a stage be filled again once all its readers have come here. Each arrives for itself: no
// slower than one lane for its warp, and an order that racecheck knows.
[[maybe_unused]] __device__ __forceinline__ void Release(const uint64_t* empty) {
  BarrierArrive(SharedAddress(empty));
}

// Finishes a warp's sums (what FinishToken of epilogue.cuh does, in batches): residuals of a batch
// are read before any value is written, and divisions overlap.
template <typename T, Epilogue kEpilogue, int kSums>
__device__ __forceinline__ void Finish(const GemmArgs& args, const Place& place,
                                       const TilePlace& tile, const RowMeta* metas,
                                       const int32_t (&acc)[kSums]) {
  constexpr int kOwnTiles = T::kOwnTiles;
  constexpr int kBatch = T::kBatch;
  constexpr int kSlotRows = kEpilogue == Epilogue::kSwiGlu ? 1 : 2;  // outputs of a slot pair
  const float scale = args.weights.scale[tile.matrix];
  const int own_token = place.split * kOwnTiles * 8 + 2 * (place.lane % 4);
  const int tokens = args.max_tokens - tile.first_token - own_token;
  const int row_block = tile.first_block + place.row_group;
  const int64_t row =
      (int64_t{row_block} * 4 + place.warp % 4) * (8 * kSlotRows) + kSlotRows * (place.lane / 4);
  if (row_block >= args.weights.row_blocks || row >= args.ld) return;
  float* const out = args.out + tile.matrix * args.matrix_stride +
                     int64_t{tile.first_token + own_token} * args.ld + row;
#pragma unroll
  for (int base = 0; base < kOwnTiles; base += kBatch) {
    float a[kBatch * 2];
    float b[kBatch * 2];
    float2 residual[kBatch * 2] = {};
#pragma unroll
    for (int i = 0; i < kBatch * 2; ++i) {
      const int token = (base + i / 2) * 8 + i % 2;
      if constexpr (kEpilogue == Epilogue::kResidual) {
        if (token < tokens) residual[i] = *reinterpret_cast<const float2*>(out + token * args.ld);
      }
      const RowMeta meta = metas[own_token + token];
      const float factor = meta.out * scale;
      const int at = (base + i / 2) * 4 + i % 2;
      const float first = static_cast<float>(acc[at] - meta.code_sum);
      const float second = static_cast<float>((acc[at + 2] >> 2) - meta.code_sum);
      if constexpr (kEpilogue == Epilogue::kResidual) {
        a[i] = fmaf(first, factor, residual[i].x);
        b[i] = fmaf(second, factor, residual[i].y);
      } else {
        a[i] = first * factor;
        b[i] = second * factor;
      }
    }
    if constexpr (kEpilogue == Epilogue::kSwiGlu) SiluBatch(a, a);
#pragma unroll
    for (int i = 0; i < kBatch * 2; ++i) {
      const int token = (base + i / 2) * 8 + i % 2;
      float* const to = out + token * args.ld;
      if constexpr (kEpilogue == Epilogue::kSwiGlu) {
        if (token < tokens) *to = a[i] * b[i];
      } else {
        StorePair(to, make_float2(a[i], b[i]), token < tokens);
      }
    }
  }
}

// Begins to copy what a tile's epilogue needs of its tokens: each thread of a team that of one.
template <typename T>
__device__ __forceinline__ void CopyMeta(const GemmArgs& args, const TilePlace& tile, int thread,
                                         RowMeta* metas) {
  if (thread >= T::kTokens || tile.first_token + thread >= args.max_tokens) return;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(SharedAddress(metas + thread)),
               "l"(args.meta + int64_t{tile.matrix} * args.stride + tile.first_token + thread)
               : "memory");
}

// A tile of a block, and whether it is the block's first and last one.
struct OwnTile {
  int tile;
  bool first;
  bool last;
};

// The part of a tile that one consumer thread's warpgroup computes and stores. metas: of the
// tile's tokens.
template <typename T>
__device__ __forceinline__ void Consume(const GemmArgs& args, const Place& place,
                                        const OwnTile& own, uint32_t ring, RowMeta* metas,
                                        Shared<T>& shared, RingPlace<T>& at) {
  constexpr int kTiles = T::kTokens / 8;
  const int k_blocks = args.weights.k_blocks;
  // Blocks past the matrix read whatever the ring holds there; their sums are not stored.
  const uint32_t own_weights =
      ring + T::kTokenBytes + place.row_group * kBlockBytes + (threadIdx.x % 128) * 16;
  const TilePlace tile = PlaceOf<T>(args, own.tile);
  CopyMeta<T>(args, tile, place.thread, metas);
  int32_t acc[kTiles * 4] = {};
  uint4 words;
  const auto load_words = [&] {
    BarrierWait(SharedAddress(&shared.full[at.stage]), at.parity);
    words = LoadShared16(own_weights + at.stage * T::kStageBytes);
  };

  // Before the turn a stage that was full two rounds ago would look like one of this tile.
  if (T::kTeams > 1 && !own.first) AwaitTurn<T>(place.team);
  if (place.split < k_blocks) load_words();
  int last_stage = 0;
#pragma unroll 1
  for (int k_block = place.split; k_block < k_blocks; k_block += T::kSplit) {
    const int stage = at.stage;
    // All stages of this tile have been full.
    if (T::kTeams > 1 && !own.last && k_block == k_blocks - 1) PassTurn<T>(place.team);
    const uint64_t tokens = TileDescriptor(ring + stage * T::kStageBytes);
    at.template Advance<T::kSplit>();
    // Two k-steps a group of wgmma: while one group runs, the next one's fragments are unpacked.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      WeightFragment a[2] = {Unpack(half == 0 ? words.x : words.z),
                             Unpack(half == 0 ? words.y : words.w)};
      Pin(a[0]);
      Pin(a[1]);
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Wgmma<T::kTokens>::Run(acc, a[step], tokens + 2 * (2 * half + step));
      }
      WgmmaCommit();
      if (half == 1 && k_block + T::kSplit < k_blocks) load_words();
      WgmmaWait<1>();
      // The wait above ended the previous stage's last group.
      if (half == 0 && k_block >= T::kSplit) Release(&shared.empty[last_stage]);
    }
    last_stage = stage;
  }
  WgmmaWait<0>();
  if constexpr (T::kSplit == 1) Release(&shared.empty[last_stage]);
  asm volatile("cp.async.wait_all;" ::: "memory");
  SyncTeam<T>(place.team);
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) Pin(acc[i]);

  if constexpr (T::kSplit == 2) {
    // Each half of the split finishes half of the tokens with the other's sums.
    constexpr int kHalf = kTiles / 2 * 4;
    constexpr int kStride = T::kConsumers / 2 * 4;
    const uint32_t exchange = ring + (threadIdx.x % (T::kConsumers / 2)) * 4;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      StoreShared4(exchange + (place.split * kHalf + i) * kStride,
                   place.split == 0 ? acc[kHalf + i] : acc[i]);
    }
    SyncTeam<T>(place.team);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int32_t own = place.split == 0 ? acc[i] : acc[kHalf + i];
      acc[i] = own + LoadShared4(exchange + ((1 - place.split) * kHalf + i) * kStride);
    }
  }

  switch (args.epilogue) {
    case Epilogue::kStore:
      return Finish<T, Epilogue::kStore>(args, place, tile, metas, acc);
    case Epilogue::kResidual:
      return Finish<T, Epilogue::kResidual>(args, place, tile, metas, acc);
    case Epilogue::kSwiGlu:
      return Finish<T, Epilogue::kSwiGlu>(args, place, tile, metas, acc);
    case Epilogue::kRecurrence:
      break;
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    GemmWgmmaKernel(const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ Shared<T> shared;

  const uint32_t ring = (SharedAddress(dynamic_shared) + 1023) & ~1023u;
  // Uniform to the compiler too, as wgmma wants it.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int tiles = TilesOf<T>(args);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      BarrierInit(SharedAddress(&shared.full[stage]), 1);
      BarrierInit(SharedAddress(&shared.empty[stage]), 128 * T::kRowGroups);
    }
    BarrierInitFence();
  }
  __syncthreads();
  AllowNext();

  if (warp >= T::kConsumers / 32) {
    if constexpr (T::kMovesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == T::kConsumers) Produce<T>(args, tiles, ring, shared);
  } else {
    if constexpr (T::kMovesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    // The residual stream and the row scales come from earlier kernels.
    WaitForPrevious();
    constexpr int kTeamWarps = T::kTeamThreads / 32;
    const int team = T::kTeams == 1 ? 0 : warp / kTeamWarps;
    const int group = warp % kTeamWarps / 4;
    const Place place = {team,
                         static_cast<int>(threadIdx.x) % T::kTeamThreads,
                         warp % kTeamWarps,
                         static_cast<int>(threadIdx.x) % 32,
                         group % T::kRowGroups,
                         group / T::kRowGroups};
    const int stride = static_cast<int>(gridDim.x);
    const int first = static_cast<int>(blockIdx.x);
    RingPlace<T> at = {place.split, 0};
    if (team > 0) at.Skip(args.weights.k_blocks);
    int parity = 0;
    for (int tile = first + team * stride; tile < tiles; tile += T::kTeams * stride, parity ^= 1) {
      // The scales of a tile take the place of those of the team's last but one: all threads are
      // done with these when one begins here, as they have met in the last.
      Consume<T>(args, place, {tile, tile == first, tile + stride >= tiles}, ring,
                 shared.meta[team][parity], shared, at);
      if constexpr (T::kTeams > 1) at.Skip(args.weights.k_blocks);
    }
  }
#endif
}

template <typename T>
cudaError_t LaunchTile(const GemmArgs& args, const LaunchContext& context) {
  // The halves of a split exchange their sums where the next tile would be loaded.
  const int tiles = TilesOf<T>(args);
  const int blocks = T::kSplit == 1 ? std::min(tiles, context.num_sms * T::kBlocksPerSm) : tiles;
  const dim3 grid(static_cast<uint32_t>(blocks));
  return Launch<GemmWgmmaKernel<T>>(context, grid, dim3(T::kThreads), T::kSharedBytes, args);
}

// Estimated nanoseconds of a product: what the busiest multiprocessor takes, fitted to what
// cuda_product_bench measured (decisions 0208 and 0210). A tile takes kBlockNs for every 128
// columns and kTileNs to begin and to finish. Two row groups on a multiprocessor twice run as a
// pair, and one of the pair alone is little faster; with two teams one multiplies while the other
// finishes.
template <typename T>
int64_t Estimate(const GemmArgs& args, const LaunchContext& context) {
  const int64_t sums = int64_t{T::kBlockNs} * args.weights.k_blocks;
  int64_t rounds = CeilDiv(TilesOf<T>(args), context.num_sms);
  if (T::kTeams == 2) {
    constexpr int64_t kLaunchNs = 3640;
    return rounds * std::max(sums, (sums + T::kTileNs) / 2) + kLaunchNs;
  }
  if (T::kRowGroups == 2) rounds = RoundUp(rounds, 2);
  return rounds * (T::kTileNs + sums);
}

using Launcher = cudaError_t (*)(const GemmArgs&, const LaunchContext&);

template <typename... Tiles>
cudaError_t LaunchBest(const GemmArgs& args, const LaunchContext& context) {
  const int64_t estimates[] = {Estimate<Tiles>(args, context)...};
  const Launcher launchers[] = {LaunchTile<Tiles>...};
  static_assert(sizeof...(Tiles) == kNumWgmmaTiles);
  if (args.tile >= kNumWgmmaTiles) return cudaErrorInvalidValue;
  const int64_t* const best = std::min_element(std::begin(estimates), std::end(estimates));
  return launchers[args.tile >= 0 ? args.tile : best - estimates](args, context);
}

}  // namespace

cudaError_t LaunchGemmWgmma(const GemmArgs& args, const LaunchContext& context) {
  // row groups, split, teams, tokens, stages, blocks an SM, ns a tile, ns a column block
  return LaunchBest<Tile<1, 2, 1, 16, 12, 2, 910, 86>, Tile<1, 2, 1, 32, 16, 2, 1950, 92>,
                    Tile<1, 2, 1, 48, 10, 2, 2450, 84>, Tile<1, 2, 1, 64, 10, 2, 2340, 96>,
                    Tile<2, 1, 1, 64, 8, 2, 1780, 177>, Tile<2, 1, 2, 128, 10, 1, 5200, 370>>(
      args, context);
}

}  // namespace mmfree::cuda
