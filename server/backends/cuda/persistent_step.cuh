// A block's way through all stages of a decode step of few rows, for decode_persistent.cu.
//
// Between the last store of a stage anywhere and the sums of the next everywhere lies one chain of
// dependent latencies; whatever does not belong to it is taken off it:
//   - Weights. Each warp has a ring of pieces in shared memory and copies a new piece into it for
//     each that it multiplies, in the order of its work over all stages: memory is read throughout,
//     across waits and stages.
//   - No barrier over the device. Values are read as they arrive (persistent_exchange.cuh).
//   - One thread copies the norms of the next stage as soon as this one has quantised, and the
//     arguments of the stage after it; another fences what has been written.
//   - Quantisation needs the maxima of a row, not the ordered sums of its norms: those are formed
//     by some warps while the others make the codes.
// The stages differ before and after their product, which is one piece of code for all.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_STEP_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_STEP_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/backends/cuda/persistent_exchange.cuh"
#include "server/backends/cuda/persistent_layout.h"
#include "server/backends/cuda/persistent_norm.cuh"
#include "server/backends/cuda/persistent_product.cuh"
#include "server/backends/cuda/weight_ring.cuh"

namespace mmfree::cuda {

template <int kRows, int kDepth>
class PersistentStep {
 public:
  using Block = PersistentBlock<kRows>;

  __device__ __forceinline__ PersistentStep(const PersistentDecodeArgs& kernel, uint8_t* shared,
                                            Block& block)
      : kernel_(kernel),
        shared_(shared),
        block_(block),
        ring_(kernel.weights, /*passes=*/1,
              reinterpret_cast<UnitRun*>(shared + kernel.shared.runs) +
                  threadIdx.x / 32 * kernel.shared.runs_per_warp,
              shared + kernel.shared.ring + threadIdx.x / 32 * kDepth * kPieceBytes) {}

  __device__ __forceinline__ void Run();

 private:
  static_assert(sizeof(DecodeArgs) % 16 == 0);

  __device__ __forceinline__ int KindOf(int stage) const {
    return stage == 4 * kernel_.weights.layers ? kHeadKind : stage % 4;
  }
  __device__ __forceinline__ const DecodeArgs& Args(int stage) const {
    return *reinterpret_cast<const DecodeArgs*>(block_.stages[stage % kStageArgs]);
  }
  // One thread: copies the arguments of a stage.
  __device__ __forceinline__ void CopyArgs(int stage) {
    if (stage >= kernel_.num_stages) return;
    const uint32_t barrier = SharedAddress(&block_.args[stage % 2]);
    BarrierArriveExpect(barrier, sizeof(DecodeArgs));
    BulkCopy(SharedAddress(block_.stages[stage % kStageArgs]), kernel_.stages + stage,
             sizeof(DecodeArgs), barrier);
  }
  __device__ __forceinline__ void AwaitArgs(int stage) const {
    BarrierWait(SharedAddress(&block_.args[stage % 2]), stage / 2 % 2);
  }
  __device__ __forceinline__ static int LogRows(const DecodeArgs& args) {
    return args.unit_rows == kTileRows ? kLogTileRows : kLogTileRows - 1;
  }
  __device__ __forceinline__ float* Norms() const {
    return reinterpret_cast<float*>(shared_ + kernel_.shared.norms);
  }
  __device__ __forceinline__ int32_t* SumsOf(int stage) const {
    return reinterpret_cast<int32_t*>(shared_ + kernel_.shared.sums[stage % 2]);
  }
  __device__ __forceinline__ StageBuffers Buffers(const DecodeArgs& args, int stage) const {
    StageBuffers buffers;
    buffers.x = reinterpret_cast<float*>(shared_ + kernel_.shared.x);
    buffers.y = buffers.x + kRows * args.padded_cols;
    buffers.w2 = Norms();
    buffers.w1 = buffers.w2 + OutputsOf(args.kind) * args.padded_cols;
    buffers.codes = shared_ + kernel_.shared.codes;
    buffers.sums = SumsOf(stage);
    return buffers;
  }

  // One thread:
  __device__ __forceinline__ void CopyNorms(int stage);
  __device__ __forceinline__ void CopyAhead(int stage);
  __device__ __forceinline__ void Begin();
  __device__ __forceinline__ void End();
  // A warp:
  template <NormKind kKind>
  __device__ __forceinline__ void FormScales(const DecodeArgs& args);
  // All:
  __device__ __forceinline__ UnitRun RunOf(const PersistentKind& kind, int first_unit,
                                           const PieceRange& range, int n) const;
  __device__ __forceinline__ void Split();
  __device__ __forceinline__ void ZeroSums(int stage) const;
  template <NormKind kKind>
  __device__ __forceinline__ RowSource SourceOf(const DecodeArgs& args, int stage) const;
  template <NormKind kKind, Epilogue kEpilogue>
  __device__ __forceinline__ void Write(const DecodeArgs& args, int stage,
                                        const EpilogueItem<kEpilogue, kRows>& item,
                                        const EpilogueOutput& output);
  template <NormKind kKind, Epilogue kEpilogue>
  __device__ __forceinline__ EpilogueInput Prepare(int stage, const BlockUnits& units,
                                                   int32_t num_rows);
  template <NormKind kKind, Epilogue kEpilogue>
  __device__ __forceinline__ void Complete(int stage, const BlockUnits& units,
                                           const EpilogueInput& input, int32_t num_rows);
  __device__ __forceinline__ void PassOver(int stage);
  __device__ __forceinline__ void Compute();

  const PersistentDecodeArgs& kernel_;
  uint8_t* const shared_;
  Block& block_;
  WeightRing<kDepth, /*kPieces=*/1, /*kMayHalve=*/true> ring_;
  int set_ = 0;  // of the present layer's exchange buffers
  // Of this thread's epilogue items:
  int32_t row_slot_ = 0;
  float2 residual_ = {0.0f, 0.0f};  // the residual stream where they add to it
};

// The n-th run of a warp's share of pieces.
template <int kRows, int kDepth>
__device__ __forceinline__ UnitRun PersistentStep<kRows, kDepth>::RunOf(const PersistentKind& kind,
                                                                        int first_unit,
                                                                        const PieceRange& range,
                                                                        int n) const {
  const int per_tile = PiecesPerTile(kind);
  const int halves = kTileRows / kind.unit_rows;
  const int tile = range.first / per_tile + n;
  const int piece = n == 0 ? range.first % per_tile : 0;
  const int unit = first_unit + tile / kind.matrices;
  const int row_tile = unit / halves;
  const uint32_t block = static_cast<uint32_t>(
      (tile % kind.matrices * kind.row_blocks + row_tile / 4) * kind.k_blocks + piece * halves);
  return {kind.weights_at + block * (kBlockBytes / 16) + row_tile % 4 * 32 + unit % halves * 16,
          (min(per_tile, range.end - tile * per_tile) - piece) + (halves > 1 ? kHalved : 0)};
}

// Computes who does what; the same in every layer.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Split() {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int n = 0; n < kStageKinds; ++n) {
    const PersistentKind& kind = kernel_.kinds[n];
    const BlockUnits units = UnitsOfBlock(kind, blockIdx.x, gridDim.x);
    const PieceRange range = PiecesOfWarp(kind, units.count, gridDim.x, warp);
    if (n == kHeadKind) ring_.EndLayer();
    ring_.List(TilesOfRange(kind, range),
               [&](int run) { return RunOf(kind, units.first, range, run); });
    if (threadIdx.x % 32 == 0) {
      const int per_tile = PiecesPerTile(kind);
      block_.shares[n][warp] = {range.first / per_tile, range.first % per_tile,
                                range.end - range.first};
      if (warp == 0) block_.units[n] = units;
    }
  }
}

// One thread: a stage's norms into shared memory.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::CopyNorms(int stage) {
  AwaitArgs(stage);
  const DecodeArgs& args = Args(stage);
  const uint32_t norms = SharedAddress(&block_.norms);
  const uint32_t bytes = static_cast<uint32_t>(args.padded_cols) * 4;
  const int outputs = OutputsOf(args.kind);
  BarrierArriveExpect(norms, bytes * (outputs + (args.w1 != nullptr ? 1 : 0)));
  uint32_t to = SharedAddress(Norms());
  for (int o = 0; o < outputs; ++o, to += bytes) BulkCopy(to, args.w2[o], bytes, norms);
  if (args.w1 != nullptr) BulkCopy(to, args.w1, bytes, norms);
}

// One thread, before the block is synchronized.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Begin() {
  block_.first_set = kernel_.exchange.state->first_set;
  for (uint64_t& barrier : block_.args) BarrierInit(SharedAddress(&barrier), 1);
  BarrierInit(SharedAddress(&block_.norms), 1);
  BarrierInitFence();
  CopyArgs(0);
  CopyArgs(1);
  CopyNorms(0);
}

// One thread, when the block has used the norms of `stage`.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::CopyAhead(int stage) {
  CopyArgs(stage + 2);
  if (stage + 1 < kernel_.num_stages) CopyNorms(stage + 1);
}

// One thread. The last block to come here: every other has read which set came first.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::End() {
  ExchangeState* const state = kernel_.exchange.state;
  if (atomicAdd(&state->exits, 1) < gridDim.x - 1) return;
  state->first_set = (block_.first_set + kernel_.weights.layers) % kExchangeSets;
  state->exits = 0;
}

template <int kRows, int kDepth>
template <NormKind kKind>
__device__ __forceinline__ RowSource PersistentStep<kRows, kDepth>::SourceOf(const DecodeArgs& args,
                                                                             int stage) const {
  const PersistentExchange& exchange = kernel_.exchange;
  const Places places(exchange, set_);
  if constexpr (kKind == NormKind::kScanned) {
    return {places.present(), places.present() + exchange.gated, true};
  } else if constexpr (kKind == NormKind::kOneNorm) {
    return {places.present() + exchange.z, nullptr, true};
  } else if constexpr (kKind == NormKind::kAttention) {
    if (stage == 0) return {args.x, nullptr, false};
    return {places.last() + exchange.hidden, nullptr, true};
  } else {
    // The head's set is that of the last layer.
    const int at = KindOf(stage) == kHeadKind ? exchange.hidden : exchange.middle;
    return {places.present() + at, nullptr, true};
  }
}

template <int kRows, int kDepth>
template <NormKind kKind, Epilogue kEpilogue>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Write(
    const DecodeArgs& args, int stage, const EpilogueItem<kEpilogue, kRows>& item,
    const EpilogueOutput& output) {
  const PersistentExchange& exchange = kernel_.exchange;
  const Places places(exchange, set_);
  const int at = item.row * static_cast<int>(args.ld) + item.column;
  if constexpr (kEpilogue == Epilogue::kRecurrence) {
    places.Write(at, output.values.x);
    places.Write(exchange.gated + at, output.gated);
    args.states[row_slot_ * args.state_stride + item.column] = output.state;
  } else if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    places.Write(exchange.z + at, output.values.x);
  } else if constexpr (kEpilogue == Epilogue::kResidual) {
    constexpr bool kEndsLayer = kKind == NormKind::kOneNorm;
    places.Write((kEndsLayer ? exchange.hidden : exchange.middle) + at, output.values);
    residual_ = output.values;
    if (stage == 4 * kernel_.weights.layers - 1) StoreOutput(args, item, row_slot_, output);
  } else {
    StoreOutput(args, item, row_slot_, output);
  }
}

// The scales of the results, from the sums of the norms.
template <int kRows, int kDepth>
template <NormKind kKind>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::FormScales(const DecodeArgs& args) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  const int lane = threadIdx.x % 32;
  if (lane < kOutputs * kRows) {
    const int output = lane % kOutputs;
    const int row = lane / kOutputs;
    Of<kKind>(block_.scales).row[output][row] = Scale<kKind>(block_, args, output, row);
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kQuantizingWarps; ++w) sum += block_.warp_code_sums[output][row][w];
    Of<kKind>(block_.code_sums)[output][row] = sum;
  }
}

// A stage up to its product: leaves the codes.
template <int kRows, int kDepth>
template <NormKind kKind, Epilogue kEpilogue>
__device__ __forceinline__ EpilogueInput
PersistentStep<kRows, kDepth>::Prepare(int stage, const BlockUnits& units, int32_t num_rows) {
  const DecodeArgs& args = Args(stage);
  const EpilogueItem<kEpilogue, kRows> item(args, units.first, units.count, LogRows(args),
                                            num_rows);
  EpilogueInput input;
  if (kEpilogue != Epilogue::kResidual || stage == 1) {
    input = LoadEpilogueInput(args, item, row_slot_);
  } else {
    input.residual = residual_;
  }
  const StageBuffers buffers = Buffers(args, stage);
  LoadRows<kKind>(block_, args, buffers, SourceOf<kKind>(args, stage), num_rows, kernel_.root_eps,
                  stage % 2);
  __syncthreads();
  ZeroSums(stage + 1);
  QuantizeBlock<kKind>(block_, args, buffers);
  __syncthreads();
  if (static_cast<int>(threadIdx.x / 32) == kScalingWarp) FormScales<kKind>(args);
  return input;
}

// A stage from its sums on.
template <int kRows, int kDepth>
template <NormKind kKind, Epilogue kEpilogue>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Complete(int stage,
                                                                        const BlockUnits& units,
                                                                        const EpilogueInput& input,
                                                                        int32_t num_rows) {
  const DecodeArgs& args = Args(stage);
  const EpilogueItem<kEpilogue, kRows> item(args, units.first, units.count, LogRows(args),
                                            num_rows);
  if (!item.owned) return;
  Write<kKind>(args, stage, item,
               Finish<kKind>(args, Buffers(args, stage), Of<kKind>(block_.scales),
                             Of<kKind>(block_.code_sums), item, LogRows(args), input));
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::ZeroSums(int stage) const {
  int32_t* const sums = SumsOf(stage);
  for (int n = threadIdx.x; n < kernel_.shared.num_sums; n += kBlockThreads) sums[n] = 0;
}

// A stage in which the block has no work.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::PassOver(int stage) {
  BarrierWait(SharedAddress(&block_.norms), stage % 2);
  __syncthreads();
  ZeroSums(stage + 1);
  if (threadIdx.x == 32 * kCopyingWarp) CopyAhead(stage);
  __syncwarp();
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Compute() {
  AwaitArgs(0);
  const int32_t num_tokens = *Args(0).num_rows;
  const int row = threadIdx.x % kRows;
  if (row < num_tokens) row_slot_ = Args(0).rows[row].slot;
  set_ = block_.first_set;
#pragma unroll 1
  for (int stage = 0; stage < kernel_.num_stages; ++stage) {
    AwaitArgs(stage);
    const int kind = KindOf(stage);
    if (kind == 0 && stage > 0) set_ = set_ + 1 == kExchangeSets ? 0 : set_ + 1;
    const BlockUnits units = block_.units[kind];
    if (units.count == 0) {
      PassOver(stage);
      continue;
    }
    const int32_t num_rows = kind == kHeadKind ? *Args(stage).num_rows : num_tokens;
    EpilogueInput input;
    switch (kind) {
      case 0:
        input = Prepare<NormKind::kAttention, Epilogue::kRecurrence>(stage, units, num_rows);
        break;
      case 1:
        input = Prepare<NormKind::kScanned, Epilogue::kResidual>(stage, units, num_rows);
        break;
      case 2:
        input = Prepare<NormKind::kHidden, Epilogue::kSwiGlu>(stage, units, num_rows);
        break;
      case 3:
        input = Prepare<NormKind::kOneNorm, Epilogue::kResidual>(stage, units, num_rows);
        break;
      default:
        input = Prepare<NormKind::kHidden, Epilogue::kStore>(stage, units, num_rows);
        break;
    }
    if (threadIdx.x == 32 * kCopyingWarp) CopyAhead(stage);
    // What the block wrote in the stage before becomes visible everywhere before it writes again.
    if (threadIdx.x == 32 * kFencingWarp) Fence();
    __syncwarp();
    MultiplyShare<kRows>(Args(stage), Buffers(Args(stage), stage),
                         block_.shares[kind][threadIdx.x / 32], ring_);
    __syncwarp();
    __syncthreads();
    switch (kind) {
      case 0:
        Complete<NormKind::kAttention, Epilogue::kRecurrence>(stage, units, input, num_rows);
        break;
      case 1:
        Complete<NormKind::kScanned, Epilogue::kResidual>(stage, units, input, num_rows);
        break;
      case 2:
        Complete<NormKind::kHidden, Epilogue::kSwiGlu>(stage, units, input, num_rows);
        break;
      case 3:
        Complete<NormKind::kOneNorm, Epilogue::kResidual>(stage, units, input, num_rows);
        break;
      default:
        Complete<NormKind::kHidden, Epilogue::kStore>(stage, units, input, num_rows);
        break;
    }
  }
  WaitForCopies();
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Run() {
  Split();
  ring_.Start();
  ZeroSums(0);
  WaitForPrevious();
  if (threadIdx.x == 32 * kCopyingWarp) Begin();
  __syncwarp();
  __syncthreads();
  Compute();
  AllowNext();
  __syncwarp();
  __syncthreads();
  if (threadIdx.x == 0) End();
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_STEP_CUH_
