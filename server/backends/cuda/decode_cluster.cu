// All layers of a decode step in one kernel of independent clusters: each takes a few rows through
// the whole model. Its 16 blocks share the products and the columns of the norms
// (cluster_block.cuh) and pass each other what they need directly, through each other's shared
// memory; nothing waits for the whole device, and no activation goes through global memory.
//
// Between two products lie two exchanges: of each block's sums and maxima of its columns, which
// give every block the scale of every row; and of the codes of its columns. Both are stores into
// the receivers' shared memory that complete on the receivers' mbarriers. Their buffers need no
// other guard: a block sends its codes of a stage after it has read the sums of all, and its sums
// for the next stage after it has multiplied the codes of all, so that whoever has received from
// all may overwrite what they have used.
//
// Weights do not depend on rows. Each warp copies them ahead in the order of its work
// (weight_ring.cuh), across all waits.
#include <cuda_runtime.h>

#include <algorithm>

#include "server/backends/cuda/cluster_block.cuh"
#include "server/backends/cuda/cluster_exchange.cuh"
#include "server/backends/cuda/cluster_finish.cuh"
#include "server/backends/cuda/cluster_step.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"

namespace mmfree::cuda {

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::RunStage(int index, int layer,
                                                                     int model_layer) {
  const ClusterStage& stage = block_.stages[index];
  const ClusterStage& next = block_.stages[(index + 1) % kClusterStages];
  const bool makes_scales = threadIdx.x / 32 == kClusterWarps - 1;
  SendStats(stage);
  RowNorm norm;
  if (makes_scales) {
    BarrierWait(SharedAddress(&block_.stats), parity_);
    const int lane = threadIdx.x % 32;
    if (lane == 0) BarrierArriveExpect(SharedAddress(&block_.stats), next.stats_received);
    norm = TakeStats(stage);
    MakeCodeScale(stage, norm);
    // What was sent for the stage before has arrived everywhere.
    if (lane < 4 * kRows) {
      reinterpret_cast<int32_t*>(OwnCodes(stage) + stage.codes_bytes)[lane] = 0;
    }
  }
  __syncthreads();
  Quantize(stage, layer);
  BulkCopyFence();
  __syncthreads();
  SendCodes(stage);
  if (makes_scales) MakeOutScale(stage, norm);
  if (index == kRecurrenceStage) ReadState(model_layer);
  BarrierWait(SharedAddress(&block_.codes), parity_);
  if (threadIdx.x == 0) BarrierArriveExpect(SharedAddress(&block_.codes), next.codes_received);
  AddCodeSums(stage);
  Multiply(stage, block_.shares[index][threadIdx.x / 32]);
  __syncthreads();
  if (index == kRecurrenceStage) {
    FinishRecurrence(next, layer, model_layer);
  } else if (index == kGateStage) {
    FinishGate(next, layer);
  } else {
    FinishResidual(next, index, layer, model_layer + 1 == args_.weights.layers);
  }
  // The vectors that these overwrite are of the layer before.
  if (index == kRecurrenceStage && threadIdx.x == 0) CopyNorms(layer + 1);
  parity_ ^= 1;
  __syncthreads();
}

template <int kRows, int kDepth>
__device__ __forceinline__ void ClusterStep<kRows, kDepth>::Run(int first_row, int row_step,
                                                                int num_rows) {
  Split();
  if (threadIdx.x == 0) {
    BarrierInit(SharedAddress(&block_.stats), 1);
    BarrierInit(SharedAddress(&block_.codes), 1);
    BarrierInit(SharedAddress(&block_.norms), 1);
    BarrierInitFence();
    CopyNorms(0);
    const ClusterStage& stage = block_.stages[0];
    BarrierArriveExpect(SharedAddress(&block_.stats), stage.stats_received);
    BarrierArriveExpect(SharedAddress(&block_.codes), stage.codes_received);
  }
  ring_.Start();
  const int num_sums = max(TilesOfBlock(args_.dim, args_.channels, kRecurrenceStage),
                           TilesOfBlock(args_.dim, args_.channels, kGateStage)) *
                       kTileRows * kSumStride;
  for (int n = threadIdx.x; n < num_sums; n += kClusterThreads) {
    At<int32_t>(args_.shared.sums)[n] = 0;
  }
  if (threadIdx.x < 4 * kRows) {
    const int row = threadIdx.x / 4;
    const int output = threadIdx.x % 4;
    block_.max_bits[row][output] = 0;
    // Of rows that do not exist, for good.
    block_.code_scales[row][output] = 0.0f;
    block_.out_scales[row][output] = 0.0f;
  }
  ClusterSync();
  WaitForPrevious();
  AllowNext();
  const int stages_of_pass = kClusterStages * args_.weights.layers;
  int layer = 0;
#pragma unroll 1
  for (; layer < total_layers_; first_row += row_step) {
    Begin(first_row, num_rows, layer);
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < stages_of_pass; ++n) {
      const int index = n % kClusterStages;
      RunStage(index, layer, n / kClusterStages);
      if (index == kDownStage) ++layer;
    }
  }
  ring_.Drain();
  ClusterSync();
}

namespace {

template <int kRows, int kDepth>
__global__ void __launch_bounds__(kClusterThreads, 1)
    ClusterKernel(const __grid_constant__ ClusterDecodeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  using Step = ClusterStep<kRows, kDepth>;
  __shared__ typename Step::Block block;
  // The kernel before the previous one had ended when the previous one let this one start.
  const int num_rows = args.counts->tokens;
  const int first_row = static_cast<int>(blockIdx.x) / kClusterBlocks * kRows;
  if (first_row >= num_rows) {
    // The end of a kernel implies the end of those before it.
    WaitForPrevious();
    return;
  }
  const int row_step = static_cast<int>(gridDim.x) / kClusterBlocks * kRows;
  const int passes = (num_rows - first_row + row_step - 1) / row_step;
  Step(args, dynamic_shared, block, passes).Run(first_row, row_step, num_rows);
#endif
}

// How a kernel is launched.
template <int kRows, int kDepth>
class Launcher {
 public:
  Launcher(const ClusterDecodeArgs& args, int32_t clusters, const LaunchContext& context) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim.x = kClusterBlocks;
    attributes_[0].val.clusterDim.y = 1;
    attributes_[0].val.clusterDim.z = 1;
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = dim3(static_cast<uint32_t>(clusters * kClusterBlocks));
    config_.blockDim = dim3(kClusterThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(args.shared.bytes);
    config_.stream = context.stream;
    config_.attrs = attributes_;
    config_.numAttrs = context.overlap ? 2 : 1;
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Clusters that the device runs at once; 0: none, or it cannot say.
  static int32_t MaxClusters(const ClusterDecodeArgs& args, const LaunchContext& context) {
    Launcher launcher(args, 1, context);
    int clusters = 0;
    if (launcher.Allow() != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&clusters, ClusterKernel<kRows, kDepth>,
                                       &launcher.config_) != cudaSuccess) {
      cudaGetLastError();  // it is not the next call's
      return 0;
    }
    return clusters;
  }

  static cudaError_t Run(const ClusterDecodeArgs& args, int32_t clusters,
                         const LaunchContext& context) {
    Launcher launcher(args, clusters, context);
    if (const cudaError_t error = launcher.Allow(); error != cudaSuccess) return error;
    return cudaLaunchKernelEx(&launcher.config_, ClusterKernel<kRows, kDepth>, args);
  }

 private:
  cudaError_t Allow() const {
    constexpr auto kKernel = ClusterKernel<kRows, kDepth>;
    const cudaError_t error = Prepare<kKernel>(config_.dynamicSmemBytes);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }

  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

struct Variant {
  int32_t rows;
  int32_t depth;
  int32_t (*max_clusters)(const ClusterDecodeArgs&, const LaunchContext&);
  cudaError_t (*run)(const ClusterDecodeArgs&, int32_t, const LaunchContext&);
};
template <int kRows, int kDepth>
constexpr Variant VariantOf() {
  return {kRows, kDepth, Launcher<kRows, kDepth>::MaxClusters, Launcher<kRows, kDepth>::Run};
}
// For equal rows the deepest ring first.
constexpr Variant kVariants[] = {VariantOf<2, 8>(), VariantOf<4, 8>(), VariantOf<8, 8>(),
                                 VariantOf<8, 4>()};

// The longest list of runs of a warp.
int32_t RunsPerWarp(const ClusterDecodeArgs& args) {
  int32_t longest = 0;
  for (int warp = 0; warp < kClusterWarps; ++warp) {
    int32_t listed = 0;
    for (int stage = 0; stage < kClusterStages; ++stage) {
      const int groups = args.stages[stage].k_blocks / kUnitPieces;
      const int units = TilesOfBlock(args.dim, args.channels, stage) * groups;
      const int first = units * warp / kClusterWarps;
      const int end = units * (warp + 1) / kClusterWarps;
      if (first < end) listed += (end - 1) / groups - first / groups + 1;
    }
    longest = std::max(longest, listed);
  }
  return longest;
}

ClusterShared ShareMemory(const ClusterDecodeArgs& args, int32_t depth) {
  const int64_t rows = args.rows;
  ClusterShared shared;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t offset = at;
    at += RoundUp(bytes, 128);
    return static_cast<int32_t>(offset);
  };
  shared.depth = depth;
  shared.runs_per_warp = RunsPerWarp(args);
  const int64_t own_dim = OwnColumns(args.dim);
  const int64_t own_channels = OwnColumns(args.channels);
  const int64_t sent = rows * std::max(3 * own_dim, own_channels) + rows * 16;
  shared.ring = take(int64_t{kClusterWarps} * depth * kUnitPieces * kPieceBytes);
  shared.codes = take(kClusterBlocks * sent);
  shared.sums = take(int64_t{std::max(TilesOfBlock(args.dim, args.channels, kRecurrenceStage),
                                      TilesOfBlock(args.dim, args.channels, kGateStage))} *
                     kTileRows * (rows + 1) * 4);
  shared.hidden = take(rows * own_dim * 4);
  shared.gates = take(rows * own_dim * 4);
  shared.values = take(rows * std::max(own_dim, own_channels) * 4);
  shared.stats = take(kClusterBlocks * rows * int64_t{sizeof(NormStats)});
  shared.norms = take(int64_t{2} * args.norm_floats * 4);
  shared.runs = take(int64_t{kClusterWarps} * shared.runs_per_warp * int64_t{sizeof(UnitRun)});
  shared.bytes = static_cast<int32_t>(at);
  return shared;
}

}  // namespace

bool PlanClusterDecode(const LaunchContext& context, ClusterDecodeArgs* args) {
  constexpr int64_t kStaticBytes = 2048;
  if (!context.hopper || args->dim % kNormLanes != 0 || args->channels % kNormLanes != 0) {
    return false;
  }
  for (const Variant& variant : kVariants) {
    if (variant.rows != args->rows) continue;
    args->shared = ShareMemory(*args, variant.depth);
    if (args->shared.bytes + kStaticBytes > context.shared_bytes_per_block) continue;
    args->clusters = variant.max_clusters(*args, context);
    if (args->clusters > 0) return true;
  }
  return false;
}

cudaError_t LaunchClusterDecode(const ClusterDecodeArgs& args, int32_t max_rows,
                                const LaunchContext& context) {
  const int32_t clusters =
      std::min(args.clusters, static_cast<int32_t>(CeilDiv(max_rows, args.rows)));
  for (const Variant& variant : kVariants) {
    if (variant.rows == args.rows && variant.depth == args.shared.depth) {
      return variant.run(args, clusters, context);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmfree::cuda
