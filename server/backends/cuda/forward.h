// The sequence of kernels of a step.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_FORWARD_H_
#define MMFREE_SERVER_BACKENDS_CUDA_FORWARD_H_

#include <cstdint>

#include "server/backends/cuda/cluster_plan.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/backends/cuda/decode_plan.h"
#include "server/backends/cuda/device_model.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/workspace.h"
#include "server/model/config.h"

namespace mmfree::cuda {

// Capacities of a step's launches; the actual counts are in the step's inputs.
struct StepShape {
  int32_t tokens = 0;
  int32_t short_rows = 0;
  int32_t long_rows = 0;
  bool decode = false;  // every row is one token

  friend bool operator==(const StepShape&, const StepShape&) = default;
};

// Enqueues kernels; never waits or allocates, so that it can be captured. Buffers and weights must
// outlive the work.
class Forward {
 public:
  Forward(const ModelConfig& config, const DeviceModel& model, const Workspace& workspace,
          const DecodePlan& plan, const ClusterPlan& clusters, const LaunchContext& context)
      : config_(config),
        model_(model),
        workspace_(workspace),
        plan_(plan),
        clusters_(clusters),
        context_(context) {}

  // Inputs from `host` (pinned) to the device, embeddings and all layers: leaves the residual
  // stream in the workspace and advances the states.
  cudaError_t Layers(const StepInputs& host, const StepShape& shape) const;

  // A whole step with heads after at most all of its tokens; `out` as in Head, or null for no
  // heads.
  cudaError_t Step(const StepInputs& host, const StepShape& shape, HeadOutput* out) const;

  // Logits of heads [first, first + rows) and their samples and scores, into `out` (pinned, indexed
  // by head). rows is at most Workspace::head_rows.
  cudaError_t Head(int32_t first, int32_t rows, HeadOutput* out) const;

 private:
  cudaError_t AttentionBlock(const DeviceLayer& layer, float* states, float* kept,
                             const StepShape& shape) const;
  cudaError_t MlpBlock(const DeviceLayer& layer, const StepShape& shape) const;
  cudaError_t Begin(const StepInputs& host, int32_t tokens) const;
  // All layers of a step of few rows, by its plan, and the logits with `head`.
  cudaError_t FewRows(int32_t rows, bool head) const;
  cudaError_t HeadLogits(int32_t first, int32_t rows) const;
  cudaError_t Sample(int32_t first, int32_t rows, HeadOutput* out) const;
  QuantizeArgs Norm(NormKind kind, int64_t cols, int32_t stride) const;
  cudaError_t Product(const GemmArgs& args) const;

  const ModelConfig& config_;
  const DeviceModel& model_;
  const Workspace& workspace_;
  const DecodePlan& plan_;
  const ClusterPlan& clusters_;
  LaunchContext context_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_FORWARD_H_
