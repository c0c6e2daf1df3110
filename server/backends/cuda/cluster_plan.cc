#include "server/backends/cuda/cluster_plan.h"

#include <cuda_runtime.h>

#include <limits>

#include "server/backends/cuda/cluster_layout.h"
#include "server/backends/cuda/layout.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

using Kernels = CudaBackendOptions::Kernels;

constexpr int32_t kVariantRows[] = {2, 4, 8};

// As measured (decisions 0207, 0208): a block multiplies a sixteenth of a layer's weights, for the
// rows of its own cluster only. The fewer weights, the sooner that costs less than what it saves, a
// barrier of the whole device for every product.
bool ClustersAreQuicker(const ModelConfig& config) { return config.hidden_size <= 1024; }

}  // namespace

int64_t ClusterPlan::Bytes(const ModelConfig& config) {
  const int floats =
      NormFloats(static_cast<int>(config.hidden_size), static_cast<int>(config.intermediate_size));
  return config.num_layers * kClusterBlocks * floats * int64_t{sizeof(float)};
}

absl::StatusOr<ClusterPlan> ClusterPlan::Create(const ModelConfig& config, const DeviceModel& model,
                                                const Workspace& workspace, Kernels kernels,
                                                const LaunchContext& context) {
  ClusterPlan plan;
  const bool wanted =
      kernels == Kernels::kCluster || (kernels == Kernels::kAuto && ClustersAreQuicker(config));
  if (!wanted) return plan;
  const std::vector<DeviceLayer>& layers = model.layers();
  ClusterDecodeArgs args;
  args.weights = model.stacked_weights();
  args.stages[0] = layers[0].ifg;
  args.stages[1] = layers[0].o;
  args.stages[2] = layers[0].gate;
  args.stages[3] = layers[0].down;
  args.dim = static_cast<int32_t>(config.hidden_size);
  args.channels = static_cast<int32_t>(config.intermediate_size);
  args.eps = config.rms_norm_eps;
  args.norm_floats = NormFloats(args.dim, args.channels);
  args.h = workspace.h;
  args.ld_h = workspace.ld_dim;
  args.states = workspace.states;
  args.state_stride = workspace.state_stride;
  args.inputs = workspace.in.rows;
  args.counts = workspace.in.counts;
  for (const int32_t rows : kVariantRows) {
    args.rows = rows;
    if (PlanClusterDecode(context, &args)) plan.variants_.push_back(args);
  }
  if (plan.variants_.empty()) return plan;
  if (kernels == Kernels::kAuto) {
    plan.LimitToQuicker();
  } else {
    plan.max_rows_ = std::numeric_limits<int32_t>::max();
  }
  MMFREE_RETURN_IF_ERROR(plan.MakeNorms(config, model, &args));
  for (ClusterDecodeArgs& variant : plan.variants_) variant.norms = args.norms;
  return plan;
}

// As measured (decision 0207): to at least two rows, and those of one round.
void ClusterPlan::LimitToQuicker() {
  min_rows_ = 2;
  max_rows_ = variants_.back().rows * variants_.back().clusters;
}

// Gathers each block's columns of each layer's vectors.
absl::Status ClusterPlan::MakeNorms(const ModelConfig& config, const DeviceModel& model,
                                    ClusterDecodeArgs* args) {
  const std::vector<DeviceLayer>& layers = model.layers();
  MMFREE_ASSIGN_OR_RETURN(norms_, DeviceBuffer::Allocate(Bytes(config)));
  auto* to = reinterpret_cast<float*>(norms_.data());
  args->norms = to;
  constexpr size_t kOwnBytes = kClusterLanes * sizeof(float);
  for (const DeviceLayer& layer : layers) {
    const float* const vectors[] = {
        layer.attn_norm, layer.i_norm,   layer.f_norm,    layer.g_norm_in,   layer.g_norm,
        layer.o_norm,    layer.mlp_norm, layer.gate_norm, layer.lower_bound, layer.down_norm};
    const float scales[kClusterScales] = {layer.ifg.scale[0],  layer.ifg.scale[1],
                                          layer.ifg.scale[2],  layer.o.scale[0],
                                          layer.gate.scale[0], layer.down.scale[0]};
    for (int32_t block = 0; block < kClusterBlocks; ++block, to += args->norm_floats) {
      for (int v = kAttnNorm; v <= kDownNorm; ++v) {
        const int32_t columns = v == kDownNorm ? args->channels : args->dim;
        MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpy2DAsync(
            to + VectorAt(v, args->dim), kOwnBytes, vectors[v] + int64_t{block} * kClusterLanes,
            kNormLanes * sizeof(float), kOwnBytes, columns / kNormLanes, cudaMemcpyDeviceToDevice));
      }
      MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(to + ScalesAt(args->dim, args->channels), scales,
                                                  sizeof(scales), cudaMemcpyHostToDevice));
    }
  }
  MMFREE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  return absl::OkStatus();
}

const ClusterDecodeArgs* ClusterPlan::For(int32_t rows) const {
  if (rows < min_rows_ || rows > max_rows_) return nullptr;
  for (const ClusterDecodeArgs& variant : variants_) {
    if (CeilDiv(rows, variant.rows) <= variant.clusters) return &variant;
  }
  return variants_.empty() ? nullptr : &variants_.back();
}

}  // namespace mmfree::cuda
