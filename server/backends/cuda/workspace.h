// Everything on the device that is not weights: states, activations, step inputs.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_WORKSPACE_H_
#define MMFREE_SERVER_BACKENDS_CUDA_WORKSPACE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/draw_layout.h"
#include "server/backends/cuda/layout.h"
#include "server/model/config.h"

namespace mmfree::cuda {

// Rows of activations are padded to this many floats, so that vector accesses stay aligned.
inline constexpr int64_t kRowAlign = 4;

class Workspace {
 public:
  struct Sizes {
    int32_t num_slots = 0;
    int32_t resident_slots = 0;

    int64_t all_slots() const { return int64_t{num_slots} + resident_slots; }
    int32_t max_step_tokens = 0;
  };

  // Device memory that Create takes: all of it, and the part that is states.
  static int64_t Bytes(const ModelConfig& config, const Sizes& sizes);
  static int64_t StateBytes(const ModelConfig& config, const Sizes& sizes);
  // The part that is states within rewindable rows.
  static int64_t KeptBytes(const ModelConfig& config, const Sizes& sizes);

  // Allocates on the current device and zeroes it all.
  static absl::StatusOr<Workspace> Create(const ModelConfig& config, const Sizes& sizes);

  // Step inputs at full capacity in pinned memory laid out by `carver`.
  static StepInputs TakeInputs(const Sizes& sizes, Carver& carver);

  int64_t ld_dim = 0;        // D rounded up to kRowAlign
  int64_t ld_channels = 0;   // F
  int64_t ld_vocab = 0;      // V
  int64_t state_stride = 0;  // L * D
  int32_t head_rows = 0;     // rows of logits at a time

  float* states = nullptr;  // [all_slots()][L][D]
  float* kept = nullptr;    // [kMaxKeptStates][L][D] within rewindable rows; fewer for short steps
  float* h = nullptr;       // [max_step_tokens][ld_dim] residual stream
  float* values = nullptr;  // [3][max_step_tokens][ld_dim] outputs of i, f, g; y replaces f
  float* z = nullptr;       // [max_step_tokens][ld_channels]; shares memory with `values`
  int8_t* q = nullptr;      // up to 3 matrices' codes of max_step_tokens rows, see layout.h
  RowMeta* meta = nullptr;  // [3][max_step_tokens + kRowSlack]
  float* logits = nullptr;  // [head_rows][ld_vocab]
  HeadStats* stats = nullptr;  // [head_rows]
  StepInputs in;

 private:
  int64_t Bind(const ModelConfig& config, const Sizes& sizes, std::byte* base);

  DeviceBuffer memory_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_WORKSPACE_H_
