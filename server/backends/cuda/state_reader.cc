#include "server/backends/cuda/state_reader.h"

#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

// One copy alone does not fill the bus: what comes before and after it takes as long.
constexpr size_t kLanes = 4;

}  // namespace

absl::StatusOr<std::unique_ptr<StateReader>> StateReader::Create(int64_t state_floats) {
  std::unique_ptr<StateReader> reader(new StateReader);
  for (size_t i = 0; i < kLanes; ++i) {
    cudaStream_t stream = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Lane lane;
    lane.stream = Stream(stream);
    MMFREE_ASSIGN_OR_RETURN(
        lane.buffer, PinnedBuffer::Allocate(static_cast<size_t>(state_floats) * sizeof(float)));
    reader->lanes_.push_back(std::move(lane));
  }
  absl::MutexLock lock(&reader->mutex_);
  for (const Lane& lane : reader->lanes_) reader->free_.push_back(&lane);
  return reader;
}

absl::Status StateReader::Read(const float* state, cudaEvent_t ready, absl::Span<float> out) {
  const Lane* lane;
  {
    const auto is_free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !free_.empty(); };
    absl::MutexLock lock(&mutex_, absl::Condition(&is_free));
    lane = free_.back();
    free_.pop_back();
  }
  const absl::Cleanup give_back = [this, lane] {
    absl::MutexLock lock(&mutex_);
    free_.push_back(lane);
  };
  return Read(*lane, state, ready, out);
}

absl::Status StateReader::Read(const Lane& lane, const float* state, cudaEvent_t ready,
                               absl::Span<float> out) {
  const size_t bytes = out.size() * sizeof(float);
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(lane.stream.get(), ready, 0));
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(lane.buffer.data(), state, bytes, cudaMemcpyDeviceToHost, lane.stream.get()));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(lane.stream.get()));
  memcpy(out.data(), lane.buffer.data(), bytes);
  return absl::OkStatus();
}

}  // namespace mmfree::cuda
