// A model's weights in device memory, in the layout of the kernels.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DEVICE_MODEL_H_
#define MMFREE_SERVER_BACKENDS_CUDA_DEVICE_MODEL_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/layout.h"
#include "server/model/model.h"

namespace mmfree::cuda {

// fp32 vectors are zero-padded to a multiple of kColumnBlock.
struct DeviceLayer {
  const float* attn_norm = nullptr;    // [D]
  const float* i_norm = nullptr;       // [D]
  const float* f_norm = nullptr;       // [D]
  const float* g_norm_in = nullptr;    // [D]
  const float* g_norm = nullptr;       // [D]
  const float* o_norm = nullptr;       // [D]
  const float* mlp_norm = nullptr;     // [D]
  const float* gate_norm = nullptr;    // [D]
  const float* down_norm = nullptr;    // [F]
  const float* lower_bound = nullptr;  // [D]
  DeviceMatrix ifg;                    // three [D, D]: i, f, g
  DeviceMatrix o;                      // [D, D]
  DeviceMatrix gate;                   // gated, F channels of [D]
  DeviceMatrix down;                   // [D, F]
};

// Immutable once uploaded.
class DeviceModel {
 public:
  // Device memory that Upload will take for good, and more for its duration.
  static int64_t Bytes(const ModelConfig& config, DType embedding);
  static int64_t StagingBytes(const ModelConfig& config);

  // Copies and repacks the weights on the current device; blocks.
  static absl::StatusOr<DeviceModel> Upload(const Model& model);

  const std::vector<DeviceLayer>& layers() const { return layers_; }
  // The layers' weights, which lie alike, `first` being those of i|f|g.
  StackedWeights stacked_weights() const;
  const void* embedding() const { return embedding_; }
  EmbeddingType embedding_type() const { return embedding_type_; }
  const float* final_norm() const { return final_norm_; }      // [D]
  const float* lm_head_norm() const { return lm_head_norm_; }  // [D]
  const DeviceMatrix& lm_head() const { return lm_head_; }     // [V, D]
  int64_t bytes() const { return static_cast<int64_t>(memory_.size()); }

 private:
  // Binds every pointer to a part of `base`; returns the bytes taken. Null only measures.
  int64_t Bind(const ModelConfig& config, DType embedding, std::byte* base);

  DeviceBuffer memory_;
  std::vector<DeviceLayer> layers_;
  const void* embedding_ = nullptr;  // [V, D]
  EmbeddingType embedding_type_ = EmbeddingType::kF32;
  const float* final_norm_ = nullptr;
  const float* lm_head_norm_ = nullptr;
  DeviceMatrix lm_head_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DEVICE_MODEL_H_
