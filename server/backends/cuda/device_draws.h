// Draws of TokenSamplers that describe them (server/sampling/token_draw.h), made on the device:
// what they need goes there while the step computes, and only tokens, logprobs and alternatives
// come back.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DEVICE_DRAWS_H_
#define MMFREE_SERVER_BACKENDS_CUDA_DEVICE_DRAWS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/backends/backend.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/draw_layout.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/mask_cache.h"
#include "server/sampling/token_draw.h"

namespace mmfree::cuda {

// One step at a time: Begin, Add for each draw, Upload, Launch for all heads, and Result when the
// stream has done it. Not thread-safe.
class DeviceDraws {
 public:
  struct Sizes {
    int64_t vocab_size = 0;
    int32_t num_slots = 0;
    int32_t max_step_tokens = 0;
  };

  // Device memory that Create takes.
  static int64_t Bytes(const Sizes& sizes, const LaunchContext& context);
  // On the current device. Launches go to the context's stream.
  static absl::StatusOr<DeviceDraws> Create(const Sizes& sizes, const LaunchContext& context);

  // The stream has done what was launched.
  void Begin();

  // Takes the draw of head `head`, by rising heads, until the next Begin. False: it cannot be
  // described, or there is no room for it, and the host must make it.
  bool Add(int32_t head, const SamplingParams& params, uint64_t position);

  // Draws taken since Begin.
  int32_t size() const { return static_cast<int32_t>(draws_.size()); }

  // Sends what was added, beside the work of the context's stream.
  absl::Status Upload();

  // Makes the draws of heads [first, first + rows).
  //   logits [rows][ld], stats [rows]
  absl::Status Launch(const float* logits, int64_t ld, const HeadStats* stats, int32_t first,
                      int32_t rows);

  // Of the index-th draw that was added.
  SampledToken Result(int32_t index) const;

 private:
  // Room for masks that are new in one step.
  static constexpr int32_t kMaxNewMasks = 256;

  struct Added {
    int32_t head = 0;
    int32_t top_logprobs = 0;
  };

  // Parts of the memory on the device, and of that which mirrors it in pinned memory.
  struct Tables {
    DrawInput* inputs = nullptr;   // [max_draws]
    DrawEntry* entries = nullptr;  // [max_entries]
  };

  DeviceDraws(const Sizes& sizes, const LaunchContext& context);
  Tables TakeTables(Carver& carver) const;
  int64_t BindDevice(std::byte* base);
  int64_t BindPinned(std::byte* base);
  // The mask's place on the device, kNoMask for null; false when there is no room.
  bool PlaceMask(const std::shared_ptr<const TokenMask>& mask, int32_t* place);

  struct NewMask {
    int32_t place = 0;
    int32_t staged = 0;
  };

  Sizes sizes_;
  LaunchContext context_;
  int32_t max_draws_ = 0;
  int32_t max_entries_ = 0;
  int32_t num_masks_ = 0;
  int64_t mask_words_ = 0;
  bool in_shared_ = false;  // a row of logits fits a block's shared memory

  DeviceBuffer memory_;
  Tables device_;
  uint32_t* masks_ = nullptr;  // [num_masks][mask_words] on the device
  float* scratch_ = nullptr;   // [num_sms][vocab] on the device; null with in_shared_
  PinnedBuffer pinned_;
  Tables staging_;
  uint32_t* new_masks_ = nullptr;  // [kMaxNewMasks][mask_words], pinned
  DrawOutput* out_ = nullptr;      // [max_draws], pinned

  Stream copies_;
  Event uploaded_;
  std::unique_ptr<MaskCache> cache_;
  std::vector<Added> draws_;
  int32_t num_entries_ = 0;
  std::vector<NewMask> to_upload_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DEVICE_DRAWS_H_
