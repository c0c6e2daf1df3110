// The stages of a decode step of few rows, for a model and a workspace.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DECODE_PLAN_H_
#define MMFREE_SERVER_BACKENDS_CUDA_DECODE_PLAN_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/device_model.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/workspace.h"
#include "server/model/config.h"

namespace mmfree::cuda {

// Immutable. `model` and `workspace` must outlive what runs by it.
class DecodePlan {
 public:
  // Device memory that Create takes at most.
  static int64_t Bytes(const ModelConfig& config);

  // Plans nothing (max_rows() is 0) when `kernels` asks for others or the model is too large for
  // the stages. Allocates on the current device and waits for it.
  static absl::StatusOr<DecodePlan> Create(const ModelConfig& config, const DeviceModel& model,
                                           const Workspace& workspace,
                                           CudaBackendOptions::Kernels kernels,
                                           const LaunchContext& context);

  // Empty.
  DecodePlan() = default;

  // The most rows that the stages are to be used for.
  int32_t max_rows() const { return max_rows_; }

  // Four a layer, then the head's; `rows` in [1, max_rows()].
  absl::Span<const DecodeArgs> stages(int32_t rows) const { return plans_[rows - 1].stages; }

  // Whether the stages are to run in one persistent kernel.
  bool persistent(int32_t rows) const {
    return rows <= max_rows_ && plans_[rows - 1].persistent.stages != nullptr;
  }
  PersistentDecodeArgs persistent_args(int32_t rows, bool with_head) const;

 private:
  struct ForRows {
    std::vector<DecodeArgs> stages;
    PersistentDecodeArgs persistent;
  };

  // Binds every plan's stages and exchange buffers to parts of `base`; returns the bytes taken.
  int64_t Bind(const ModelConfig& config, std::byte* base,
               std::array<DecodeArgs*, kMaxDecodeRows>* stages);
  absl::Status Upload(const ModelConfig& config, absl::Span<const bool> fits);

  int32_t max_rows_ = 0;
  std::array<ForRows, kMaxDecodeRows> plans_;  // by rows - 1
  DeviceBuffer memory_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DECODE_PLAN_H_
