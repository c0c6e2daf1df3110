// What the persistent decode kernel needs to know before it runs: who does how much, and where it
// lies in a block's shared memory.
#include <algorithm>
#include <cmath>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/layout.h"
#include "server/backends/cuda/persistent_layout.h"

namespace mmfree::cuda {
namespace {

constexpr int32_t kDepths[] = {16, 12, 8};

// One epilogue item a thread.
bool ItemsFit(const DecodeArgs& stage, int32_t rows, int32_t grid) {
  const int64_t per_unit =
      stage.epilogue == Epilogue::kRecurrence ? stage.unit_rows : stage.unit_rows / 2;
  return CeilDiv(stage.units, grid) * per_unit * rows <= kBlockThreads;
}

void SetUnits(DecodeArgs& stage, bool halved) {
  stage.unit_rows = halved ? kTileRows / 2 : kTileRows;
  stage.units = stage.weights.row_blocks * (kRowBlock / stage.unit_rows);
}

// Every block has work in each layer, so that none runs ahead (persistent_exchange.cuh).
int32_t Blocks(const DecodeArgs* layer, int32_t num_sms) {
  int32_t tiles = 0;
  for (int n = 0; n < kHeadKind; ++n) {
    tiles = std::max(tiles, layer[n].weights.row_blocks * (kRowBlock / kTileRows));
  }
  return std::min(num_sms, tiles);
}

// Whether the block with most rows has fewer with tiles of half as many slots.
bool HalvesAreFairer(const DecodeArgs& stage, int32_t grid) {
  const int64_t tiles = int64_t{stage.weights.row_blocks} * (kRowBlock / kTileRows);
  return stage.weights.k_blocks % 2 == 0 && CeilDiv(2 * tiles, grid) < 2 * CeilDiv(tiles, grid);
}

// Splits `pieces` among a block's warps so that they end together: what some do beside the product
// takes as long as so many pieces.
void SplitPieces(int pieces, const int (&beside)[kPersistentWarps],
                 int16_t (&first)[kPersistentWarps + 1]) {
  int count[kPersistentWarps] = {};
  for (int n = 0; n < pieces; ++n) {
    int least = 0;
    for (int w = 1; w < kPersistentWarps; ++w) {
      if (count[w] + beside[w] < count[least] + beside[least]) least = w;
    }
    ++count[least];
  }
  first[0] = 0;
  for (int w = 0; w < kPersistentWarps; ++w) {
    first[w + 1] = static_cast<int16_t>(first[w] + count[w]);
  }
}

PersistentKind KindOf(const DecodeArgs& stage, const StackedWeights& weights, int32_t grid) {
  PersistentKind kind;
  kind.weights_at = static_cast<uint32_t>((stage.weights.codes - weights.first) / 16);
  kind.row_blocks = stage.weights.row_blocks;
  kind.k_blocks = stage.weights.k_blocks;
  kind.matrices = stage.weights.matrices;
  kind.units = stage.units;
  kind.unit_rows = stage.unit_rows;
  int beside[kPersistentWarps] = {};
  beside[kCopyingWarp] = 2;
  beside[kFencingWarp] = 4;
  beside[kScalingWarp] = 4;
  for (int more = 0; more < 2; ++more) {
    const int units = kind.units / grid + more;
    SplitPieces(units * kind.matrices * PiecesPerTile(kind), beside, kind.first_piece[more]);
  }
  return kind;
}

// The longest list of runs of a warp.
int32_t RunsPerWarp(const PersistentKind (&kinds)[kStageKinds], int32_t grid) {
  int32_t longest = 0;
  for (int32_t block = 0; block < grid; ++block) {
    for (int warp = 0; warp < kPersistentWarps; ++warp) {
      int32_t listed = 0;
      for (const PersistentKind& kind : kinds) {
        const BlockUnits units = UnitsOfBlock(kind, block, grid);
        listed += TilesOfRange(kind, PiecesOfWarp(kind, units.count, grid, warp));
      }
      longest = std::max(longest, listed);
    }
  }
  return longest;
}

// Of a set, all places.
void PlaceExchange(int32_t rows, int32_t ld, PersistentExchange* exchange) {
  const int32_t hidden = rows * ld;
  exchange->gated = hidden;
  exchange->middle = 2 * hidden;
  exchange->hidden = 3 * hidden;
  exchange->z = 4 * hidden;
}

}  // namespace

bool PlanPersistentDecode(DecodeArgs* stages, int32_t num_stages, int32_t rows,
                          const LaunchContext& context, PersistentDecodeArgs* args) {
  constexpr int64_t kStaticBytes = int64_t{6} * 1024;
  if (!context.hopper) return false;
  const int32_t grid = Blocks(stages, context.num_sms);
  args->blocks = grid;
  const int32_t num_layers = args->weights.layers;
  int64_t x = 0;
  int64_t norms = 0;
  int64_t codes = 0;
  int64_t sums = 0;
  for (int32_t n = 0; n < num_stages; ++n) {
    DecodeArgs& stage = stages[n];
    bool halved = HalvesAreFairer(stage, grid);
    // What adds to the residual stream is split alike: its values stay with their threads.
    if (stage.epilogue == Epilogue::kResidual) {
      halved = halved && HalvesAreFairer(stages[1], grid) && HalvesAreFairer(stages[3], grid);
    }
    SetUnits(stage, halved);
    if (!ItemsFit(stage, rows, grid)) return false;
    const int64_t padded = stage.padded_cols;
    const int64_t outputs = OutputsOf(stage.kind);
    const int64_t tiles = CeilDiv(stage.units, grid) * outputs;
    x = std::max(x, rows * padded * 4 * (stage.kind == NormKind::kOneNorm ? 1 : 2));
    norms = std::max(norms, (outputs + (stage.w1 != nullptr ? 1 : 0)) * padded * 4);
    codes = std::max(codes, outputs * rows * (padded + kCodePadding));
    sums = std::max(sums, tiles * stage.unit_rows * rows);
  }
  for (int kind = 0; kind < kStageKinds; ++kind) {
    args->kinds[kind] =
        KindOf(stages[kind < kHeadKind ? kind : 4 * num_layers], args->weights, grid);
  }
  PlaceExchange(rows, stages[0].ld_x, &args->exchange);
  // Rounded up, with room for the rounding of products.
  args->root_eps = std::sqrt(stages[0].eps) * 1.0001f;
  PersistentShared& shared = args->shared;
  shared.num_sums = static_cast<int32_t>(sums);
  shared.runs_per_warp = RunsPerWarp(args->kinds, grid);
  for (const int32_t depth : kDepths) {
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t offset = at;
      at += RoundUp(bytes, 128);
      return static_cast<int32_t>(offset);
    };
    shared.depth = depth;
    shared.ring = take(int64_t{kPersistentWarps} * depth * kPieceBytes);
    shared.x = take(x);
    shared.norms = take(norms);
    shared.codes = take(codes);
    shared.sums[0] = take(sums * 4);
    shared.sums[1] = take(sums * 4);
    shared.runs = take(int64_t{kPersistentWarps} * shared.runs_per_warp * int64_t{sizeof(UnitRun)});
    shared.bytes = static_cast<int32_t>(at);
    if (at + kStaticBytes <= context.shared_bytes_per_block) return true;
  }
  return false;
}

}  // namespace mmfree::cuda
