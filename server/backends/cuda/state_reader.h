// Copies states from the device to the host beside the steps.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_STATE_READER_H_
#define MMFREE_SERVER_BACKENDS_CUDA_STATE_READER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/backends/cuda/cuda_raii.h"

namespace mmfree::cuda {

// A few lanes, each a stream and a pinned buffer of one state; a read takes a lane for as long as
// it lasts, and waits when all are taken. Thread-safe.
class StateReader {
 public:
  // On the current device. `state_floats` of a state.
  static absl::StatusOr<std::unique_ptr<StateReader>> Create(int64_t state_floats);

  // Copies a state on the device, [state_floats], to `out` once `ready` has happened, as it was
  // recorded last. Blocks until it is there. On the current device of the calling thread.
  absl::Status Read(const float* state, cudaEvent_t ready, absl::Span<float> out);

 private:
  struct Lane {
    Stream stream;
    PinnedBuffer buffer;
  };

  StateReader() = default;
  // Of a lane that the caller has alone.
  static absl::Status Read(const Lane& lane, const float* state, cudaEvent_t ready,
                           absl::Span<float> out);

  std::vector<Lane> lanes_;  // constant
  absl::Mutex mutex_;
  std::vector<const Lane*> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_STATE_READER_H_
