// All stages of a decode step of few rows (decode_stage.cuh) in one kernel: a block on each
// multiprocessor goes through them, and every block waits between two until all have finished the
// first.
//
// Between the end of a stage anywhere and the sums of the next everywhere lies one chain of
// dependent latencies; whatever does not belong to it is taken off it:
//   - Weights. Each warp has a ring of pieces in shared memory and copies a new piece into it for
//     each that it multiplies, in the order of its work over all stages: memory is read throughout,
//     across waits and stages.
//   - A service warp signals and awaits the other blocks, copies the norms of the next stage as
//     soon as this one has quantised, and the arguments of the stage after it.
//   - Quantisation needs the maxima of a row, not the ordered sums of its norms: those are formed
//     by some warps while the others multiply.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/backends/cuda/persistent_norm.cuh"
#include "server/backends/cuda/weight_ring.cuh"

namespace mmfree::cuda {
namespace {

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
  static_assert(sizeof(DecodeArgs) % 16 == 0 && sizeof(DecodeArgs) / 16 <= 32);

  __device__ __forceinline__ int KindOf(int stage) const {
    return stage == 4 * kernel_.weights.layers ? kHeadKind : stage % 4;
  }
  __device__ __forceinline__ const DecodeArgs& Args(int stage) const {
    return *reinterpret_cast<const DecodeArgs*>(block_.stages[stage % kStageArgs]);
  }
  // A warp copies the arguments of a stage.
  __device__ __forceinline__ void FetchArgs(int stage) {
    const int lane = threadIdx.x % 32;
    if (stage >= kernel_.num_stages || lane >= static_cast<int>(sizeof(DecodeArgs) / 16)) return;
    reinterpret_cast<uint4*>(block_.stages[stage % kStageArgs])[lane] =
        reinterpret_cast<const uint4*>(kernel_.stages + stage)[lane];
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

  // The service warp:
  __device__ __forceinline__ void CopyNorms(int stage);
  __device__ __forceinline__ void Serve();
  // The computing warps:
  __device__ __forceinline__ UnitRun RunOf(const DecodeArgs& args, int first_unit, int first,
                                           int end, int n) const;
  __device__ __forceinline__ void Split();
  __device__ __forceinline__ void ZeroSums(int stage) const;
  template <NormKind kKind>
  __device__ __forceinline__ void Multiply(const DecodeArgs& args, const StageBuffers& buffers,
                                           const PieceShare& share);
  template <NormKind kKind, Epilogue kEpilogue>
  __device__ __forceinline__ void Stage(int stage, int32_t num_rows);
  __device__ __forceinline__ void Compute();

  const PersistentDecodeArgs& kernel_;
  uint8_t* const shared_;
  Block& block_;
  WeightRing<kDepth> ring_;
  int32_t row_slot_ = 0;  // of the row of this thread's epilogue items
};

// The n-th tile's run of pieces [first, end) of a block's units.
template <int kRows, int kDepth>
__device__ __forceinline__ UnitRun PersistentStep<kRows, kDepth>::RunOf(const DecodeArgs& args,
                                                                        int first_unit, int first,
                                                                        int end, int n) const {
  const int per_unit = TilesPerUnit(args.kind);
  const int k_blocks = args.weights.k_blocks;
  const uint32_t weights_at =
      static_cast<uint32_t>((args.weights.codes - kernel_.weights.first) / 16);
  const int tile = first / k_blocks + n;
  const int k_block = n == 0 ? first % k_blocks : 0;
  const int row_tile = first_unit + tile / per_unit;
  const uint32_t block = static_cast<uint32_t>(
      (tile % per_unit * args.weights.row_blocks + row_tile / 4) * k_blocks + k_block);
  return {weights_at + block * (kBlockBytes / 16) + row_tile % 4 * 32,
          min(k_blocks, end - tile * k_blocks) - k_block};
}

// Computes who does what; the same in every layer.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Split() {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int kind = 0; kind < kStageKinds; ++kind) {
    const DecodeArgs& args = kernel_.stages[kind < kHeadKind ? kind : 4 * kernel_.weights.layers];
    const int k_blocks = args.weights.k_blocks;
    const int first_unit = static_cast<int>(int64_t{args.units} * blockIdx.x / gridDim.x);
    const int units =
        static_cast<int>(int64_t{args.units} * (blockIdx.x + 1) / gridDim.x) - first_unit;
    const int pieces = units * TilesPerUnit(args.kind) * k_blocks;
    const int first = FirstPiece<kRows>(pieces, warp);
    const int end = FirstPiece<kRows>(pieces, warp + 1);
    if (kind == kHeadKind) ring_.EndLayer();
    if (first < end) {
      ring_.List((end - 1) / k_blocks - first / k_blocks + 1,
                 [&](int n) { return RunOf(args, first_unit, first, end, n); });
    }
    if (threadIdx.x % 32 == 0) {
      block_.shares[kind][warp] = {first / k_blocks, first % k_blocks, end - first};
      if (warp == 0) block_.units[kind] = {first_unit, units};
    }
  }
}

// One thread: a stage's norms into shared memory.
template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::CopyNorms(int stage) {
  const DecodeArgs& args = Args(stage);
  const uint32_t norms = SharedAddress(&block_.norms);
  const uint32_t bytes = static_cast<uint32_t>(args.padded_cols) * 4;
  const int outputs = OutputsOf(args.kind);
  BarrierArriveExpect(norms, bytes * (outputs + (args.w1 != nullptr ? 1 : 0)));
  uint32_t to = SharedAddress(Norms());
  for (int o = 0; o < outputs; ++o, to += bytes) BulkCopy(to, args.w2[o], bytes, norms);
  if (args.w1 != nullptr) BulkCopy(to, args.w1, bytes, norms);
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Serve() {
  const bool leads = threadIdx.x % 32 == 0;
  const uint32_t ready = SharedAddress(&block_.ready);
  if (leads) {
    CopyNorms(0);
    BarrierArrive(ready);
  }
  uint32_t arrivals = 0;
  for (int stage = 0; stage < kernel_.num_stages; ++stage) {
    BarrierWait(SharedAddress(&block_.quantized), stage % 2);
    FetchArgs(stage + 2);
    const bool last = stage + 1 == kernel_.num_stages;
    if (leads && !last) {
      // A block without work in this stage has not waited for its norms.
      BarrierWait(SharedAddress(&block_.norms), stage % 2);
      CopyNorms(stage + 1);
    }
    BarrierWait(SharedAddress(&block_.finished), stage % 2);
    __syncwarp();
    if (leads && !last) {
      AddRelease(&kernel_.barrier->arrivals, 1);
      arrivals += gridDim.x;
      while (LoadAcquire(&kernel_.barrier->arrivals) < arrivals) {
      }
      BarrierArrive(ready);
    }
    __syncwarp();
  }
  // The last block to come here leaves the barrier as it was found: no other waits there any more.
  if (leads && atomicAdd(&kernel_.barrier->exits, 1) == gridDim.x - 1) {
    kernel_.barrier->arrivals = 0;
    kernel_.barrier->exits = 0;
  }
}

// Adds one chain of sums of one tile to the block's.
template <int kRows>
__device__ __forceinline__ void FlushChain(int32_t (&acc)[4], int32_t* sums) {
  const int lane = threadIdx.x % 32;
  const int slot = lane / 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = 2 * (lane % 4) + j;
    if (row < kRows) {
      atomicAdd(&sums[slot * kRows + row], acc[j]);
      atomicAdd(&sums[(slot + 8) * kRows + row], acc[2 + j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0;
}

// Multiplies a warp's share and adds it to buffers.sums. Two pieces at a time, each with its own
// chain of sums: one alone would wait for its own results most of the time.
template <int kRows, int kDepth>
template <NormKind kKind>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Multiply(const DecodeArgs& args,
                                                                        const StageBuffers& buffers,
                                                                        const PieceShare& share) {
  constexpr int kOutputs = StageTraits<kKind>::kOutputs;
  constexpr int kGroup = 2;
  const int lane = threadIdx.x % 32;
  const int code_stride = args.padded_cols + kCodePadding;
  const uint32_t own_codes =
      SharedAddress(buffers.codes) + lane % kRows * code_stride + lane / 8 * 16;
  const int k_blocks = args.weights.k_blocks;
  int tile[kGroup];
  int k_block[kGroup];
  int32_t acc[kGroup][4] = {};
#pragma unroll
  for (int p = 0; p < kGroup; ++p) {
    tile[p] = p == 0 ? share.tile : tile[p - 1];
    k_block[p] = p == 0 ? share.k_block : k_block[p - 1] + 1;
    if (k_block[p] == k_blocks) {
      k_block[p] = 0;
      ++tile[p];
    }
  }
#pragma unroll 1
  for (int left = share.count; left > 0; left -= kGroup) {
    ring_.template Wait<kGroup>();
    // Those that do not exist are multiplied as zeros.
    uint4 words[kGroup][1] = {};
    uint32_t at[kGroup];
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      if (p < left) ring_.Read(words[p]);
      const int output = kOutputs == 1 ? 0 : tile[p] % kOutputs;
      at[p] = own_codes + output * kRows * code_stride + k_block[p] * kColumnBlock;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[kGroup][4];
#pragma unroll
      for (int p = 0; p < kGroup; ++p) LoadMatrix4(b[p], at[p] + 64 * half);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int p = 0; p < kGroup; ++p) {
          const uint4& four = words[p][0];
          const uint32_t word =
              half == 0 ? (step == 0 ? four.x : four.y) : (step == 0 ? four.z : four.w);
          const WeightFragment a = Unpack(word);
          Mma(acc[p], a.a0, a.a1, a.a2, a.a3, b[p][2 * step], b[p][2 * step + 1]);
        }
      }
    }
    // This lane has read its parts of the slots that are filled now.
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      if (p < left) ring_.Fetch();
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      const int last_tile = tile[p];
      k_block[p] += kGroup;
      while (k_block[p] >= k_blocks) {
        k_block[p] -= k_blocks;
        ++tile[p];
      }
      if (p < left && (tile[p] != last_tile || p + kGroup >= left)) {
        FlushChain<kRows>(acc[p], buffers.sums + last_tile * kTileRows * kRows);
      }
    }
  }
}

template <int kRows, int kDepth>
template <NormKind kKind, Epilogue kEpilogue>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Stage(int stage, int32_t num_rows) {
  constexpr int kOutputs = StageTraits<kKind>::kOutputs;
  const DecodeArgs& args = Args(stage);
  const int kind = KindOf(stage);
  const BlockUnits units = block_.units[kind];
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const EpilogueItem<kEpilogue, kRows> item(args, units.first, units.count, num_rows);
  const EpilogueInput input = LoadEpilogueInput(args, units.first, item, row_slot_);

  BarrierWait(SharedAddress(&block_.ready), stage % 2);
  if (units.count == 0) {
    Sync<Among::kComputing>();
    ZeroSums(stage + 1);
    if (thread == 0) BarrierArrive(SharedAddress(&block_.quantized));
    return;
  }
  const StageBuffers buffers = Buffers(args, stage);
  auto& scales = Of<kKind>(block_.scales);
  auto& code_sums = Of<kKind>(block_.code_sums);
  LoadRows<kKind>(block_, args, buffers, num_rows, kernel_.root_eps, stage % 2);
  Sync<Among::kComputing>();
  ZeroSums(stage + 1);
  QuantizeBlock<kKind>(block_, args, buffers);
  Sync<Among::kComputing>();
  if (thread == 0) BarrierArrive(SharedAddress(&block_.quantized));
  if (warp >= kFirstSummingWarp) {
    Sums<kKind>(block_, args, buffers);
    Sync<Among::kSumming>();
    const int lane = thread % 32;
    if (warp == kComputingWarps - 1 && lane < kOutputs * kRows) {
      scales.row[lane % kOutputs][lane / kOutputs] =
          Scale<kKind>(block_, args, lane % kOutputs, lane / kOutputs);
      int32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kComputingWarps; ++w) {
        sum += block_.warp_code_sums[lane % kOutputs][lane / kOutputs][w];
      }
      code_sums[lane % kOutputs][lane / kOutputs] = sum;
    }
  }
  Multiply<kKind>(args, buffers, block_.shares[kind][warp]);
  Sync<Among::kComputing>();
  Finish<kKind>(args, buffers, scales, code_sums, units.first, item, input, row_slot_);
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::ZeroSums(int stage) const {
  int32_t* const sums = SumsOf(stage);
  for (int n = threadIdx.x; n < kernel_.shared.num_sums; n += kComputingThreads) sums[n] = 0;
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Compute() {
  const int32_t num_tokens = *Args(0).num_rows;
  const int row = threadIdx.x % kRows;
  if (row < num_tokens) row_slot_ = Args(0).rows[row].slot;
#pragma unroll 1
  for (int stage = 0; stage < kernel_.num_stages; ++stage) {
    switch (KindOf(stage)) {
      case 0:
        Stage<NormKind::kAttention, Epilogue::kRecurrence>(stage, num_tokens);
        break;
      case 1:
        Stage<NormKind::kScanned, Epilogue::kResidual>(stage, num_tokens);
        break;
      case 2:
        Stage<NormKind::kHidden, Epilogue::kSwiGlu>(stage, num_tokens);
        break;
      case 3:
        Stage<NormKind::kOneNorm, Epilogue::kResidual>(stage, num_tokens);
        break;
      default:
        Stage<NormKind::kHidden, Epilogue::kStore>(stage, *Args(stage).num_rows);
        break;
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(SharedAddress(&block_.finished));
  }
  WaitForCopies();
}

template <int kRows, int kDepth>
__device__ __forceinline__ void PersistentStep<kRows, kDepth>::Run() {
  const bool computes = threadIdx.x < kComputingThreads;
  if (computes) {
    Split();
    ring_.Start();
    ZeroSums(0);
  } else {
    FetchArgs(0);
    FetchArgs(1);
    if (threadIdx.x % 32 == 0) {
      BarrierInit(SharedAddress(&block_.ready), 1);
      BarrierInit(SharedAddress(&block_.norms), 1);
      BarrierInit(SharedAddress(&block_.quantized), 1);
      BarrierInit(SharedAddress(&block_.finished), kComputingWarps);
      BarrierInitFence();
    }
  }
  __syncthreads();
  if (computes) {
    Compute();
  } else {
    Serve();
  }
}

template <int kRows, int kDepth>
__global__ void __launch_bounds__(kBlockThreads, 1)
    PersistentKernel(const __grid_constant__ PersistentDecodeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ PersistentBlock<kRows> block;
  PersistentStep<kRows, kDepth>(args, dynamic_shared, block).Run();
#endif
}

// One epilogue item a thread.
bool ItemsFit(const DecodeArgs& stage, int32_t rows, int32_t grid) {
  const int64_t per_unit = stage.epilogue == Epilogue::kRecurrence ? kTileRows : 8;
  return CeilDiv(stage.units, grid) * per_unit * rows <= kComputingThreads;
}

// Whether every layer's weights lie like those of the first, `stride` bytes on.
bool LayersAreAlike(const DecodeArgs* stages, int32_t num_layers, int64_t stride) {
  for (int32_t n = 4; n < 4 * num_layers; ++n) {
    if (stages[n].weights.codes - stages[n - 4].weights.codes != stride) return false;
  }
  return true;
}

// The longest list of runs of a warp.
template <int kRows>
int32_t RunsPerWarp(const DecodeArgs* stages, int32_t num_layers, int32_t grid) {
  int32_t longest = 0;
  for (int32_t block = 0; block < grid; ++block) {
    for (int warp = 0; warp < kComputingWarps; ++warp) {
      int32_t listed = 0;
      for (int kind = 0; kind < kStageKinds; ++kind) {
        const DecodeArgs& stage = stages[kind < kHeadKind ? kind : 4 * num_layers];
        const int32_t k_blocks = stage.weights.k_blocks;
        const int64_t first_unit = int64_t{stage.units} * block / grid;
        const int64_t units = int64_t{stage.units} * (block + 1) / grid - first_unit;
        const int pieces = static_cast<int>(units) * TilesPerUnit(stage.kind) * k_blocks;
        const int first = FirstPiece<kRows>(pieces, warp);
        const int end = FirstPiece<kRows>(pieces, warp + 1);
        if (first < end) listed += (end - 1) / k_blocks - first / k_blocks + 1;
      }
      longest = std::max(longest, listed);
    }
  }
  return longest;
}

template <int kRows, int kDepth>
cudaError_t LaunchDepth(const PersistentDecodeArgs& args, const LaunchContext& context) {
  constexpr auto kKernel = PersistentKernel<kRows, kDepth>;
  const size_t shared_bytes = static_cast<size_t>(args.shared.bytes);
  if (const cudaError_t error = Prepare<kKernel>(shared_bytes); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(context.num_sms);
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, args);
}

constexpr int32_t kDepths[] = {16, 12, 8};

template <int kRows>
cudaError_t LaunchRows(const PersistentDecodeArgs& args, const LaunchContext& context) {
  switch (args.shared.depth) {
    case 16:
      return LaunchDepth<kRows, 16>(args, context);
    case 12:
      return LaunchDepth<kRows, 12>(args, context);
    case 8:
      return LaunchDepth<kRows, 8>(args, context);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool PlanPersistentDecode(DecodeArgs* stages, int32_t num_stages, int32_t rows,
                          const LaunchContext& context, PersistentDecodeArgs* args) {
  constexpr int64_t kStaticBytes = 6 * 1024;
  if (!context.hopper) return false;
  const int32_t grid = context.num_sms;
  const int32_t num_layers = num_stages / 4;
  const int64_t stride =
      num_layers > 1 ? stages[4].weights.codes - stages[0].weights.codes : int64_t{0};
  if (!LayersAreAlike(stages, num_layers, stride)) return false;
  int64_t x = 0;
  int64_t norms = 0;
  int64_t codes = 0;
  int64_t sums = 0;
  for (int32_t n = 0; n < num_stages; ++n) {
    DecodeArgs& stage = stages[n];
    stage.units = stage.weights.row_blocks * (kRowBlock / kTileRows);
    if (!ItemsFit(stage, rows, grid)) return false;
    const int64_t padded = stage.padded_cols;
    const int64_t outputs = OutputsOf(stage.kind);
    const int64_t tiles = CeilDiv(stage.units, grid) * TilesPerUnit(stage.kind);
    x = std::max(x, rows * padded * 4 * (stage.kind == NormKind::kOneNorm ? 1 : 2));
    norms = std::max(norms, (outputs + (stage.w1 != nullptr ? 1 : 0)) * padded * 4);
    codes = std::max(codes, outputs * rows * (padded + kCodePadding));
    sums = std::max(sums, tiles * kTileRows * rows);
  }
  args->weights = {stages[0].weights.codes, static_cast<uint32_t>(stride / 16), num_layers};
  // Rounded up, with room for the rounding of products.
  args->root_eps = std::sqrt(stages[0].eps) * 1.0001f;
  PersistentShared& shared = args->shared;
  shared.num_sums = static_cast<int32_t>(sums);
  shared.runs_per_warp = rows == 1 ? RunsPerWarp<1>(stages, num_layers, grid)
                                   : RunsPerWarp<2>(stages, num_layers, grid);
  for (const int32_t depth : kDepths) {
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t offset = at;
      at += RoundUp(bytes, 128);
      return static_cast<int32_t>(offset);
    };
    shared.depth = depth;
    shared.ring = take(int64_t{kComputingWarps} * depth * kPieceBytes);
    shared.x = take(x);
    shared.norms = take(norms);
    shared.codes = take(codes);
    shared.sums[0] = take(sums * 4);
    shared.sums[1] = take(sums * 4);
    shared.runs = take(int64_t{kComputingWarps} * shared.runs_per_warp * int64_t{sizeof(UnitRun)});
    shared.bytes = static_cast<int32_t>(at);
    if (at + kStaticBytes <= context.shared_bytes_per_block) return true;
  }
  return false;
}

cudaError_t LaunchPersistentDecode(const PersistentDecodeArgs& args, int32_t rows,
                                   const LaunchContext& context) {
  return rows == 1 ? LaunchRows<1>(args, context) : LaunchRows<2>(args, context);
}

}  // namespace mmfree::cuda
