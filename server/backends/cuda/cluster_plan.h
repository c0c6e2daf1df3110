// Which steps run in the cluster kernel (decode_cluster.cu), for a model and a workspace.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_PLAN_H_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_PLAN_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/device_model.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/workspace.h"
#include "server/model/config.h"

namespace mmfree::cuda {

// Immutable. `model` and `workspace` must outlive what runs by it.
class ClusterPlan {
 public:
  // Device memory that Create takes at most.
  static int64_t Bytes(const ModelConfig& config);

  // Plans nothing when `kernels` asks for others or the device or the model does not suit the
  // kernel. Allocates on the current device and waits for it.
  static absl::StatusOr<ClusterPlan> Create(const ModelConfig& config, const DeviceModel& model,
                                            const Workspace& workspace,
                                            CudaBackendOptions::Kernels kernels,
                                            const LaunchContext& context);

  // Empty.
  ClusterPlan() = default;

  // What a step of up to `rows` single tokens is to run with; null: not with this kernel.
  const ClusterDecodeArgs* For(int32_t rows) const;

 private:
  void LimitToQuicker();
  absl::Status MakeNorms(const ModelConfig& config, const DeviceModel& model,
                         ClusterDecodeArgs* args);

  std::vector<ClusterDecodeArgs> variants_;  // by rising rows
  int32_t min_rows_ = 1;
  int32_t max_rows_ = 0;
  DeviceBuffer norms_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_PLAN_H_
