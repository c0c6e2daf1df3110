// Owners of CUDA objects and the conversion of CUDA errors to Status. Host code only.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CUDA_RAII_H_
#define MMFREE_SERVER_BACKENDS_CUDA_CUDA_RAII_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace mmfree::cuda {

// INTERNAL with CUDA's name and text of the error; OK for cudaSuccess.
inline absl::Status ToStatus(cudaError_t error, absl::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", call, ": ", cudaGetErrorName(error), " (",
                                          cudaGetErrorString(error), ")"));
}

#define MMFREE_CUDA_RETURN_IF_ERROR(call)                                         \
  do {                                                                            \
    if (const cudaError_t mmfree_error_ = (call); mmfree_error_ != cudaSuccess) { \
      return ::mmfree::cuda::ToStatus(mmfree_error_, #call);                      \
    }                                                                             \
  } while (false)

// A move-only handle that calls `Destroy` once.
template <typename Handle, cudaError_t (*Destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    // Nothing can be done about a failure here; a lost device was reported by the call that met it.
    if (handle_ != Handle{}) static_cast<void>(Destroy(handle_));
  }

  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Handle{}; }

 private:
  Handle handle_{};
};

using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using GraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

// Bytes on the device, at least 256-byte aligned.
class DeviceBuffer {
 public:
  static absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) {
    void* data = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaMalloc(&data, bytes));
    return DeviceBuffer(data, bytes);
  }
  DeviceBuffer() = default;

  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  size_t size() const { return size_; }

 private:
  DeviceBuffer(void* data, size_t size) : memory_(data), size_(size) {}

  Owned<void*, cudaFree> memory_;
  size_t size_ = 0;
};

// Page-locked host memory that kernels can read and write in place at the same address.
class PinnedBuffer {
 public:
  static absl::StatusOr<PinnedBuffer> Allocate(size_t bytes) {
    void* data = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    return PinnedBuffer(data, bytes);
  }
  PinnedBuffer() = default;

  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  size_t size() const { return size_; }

 private:
  PinnedBuffer(void* data, size_t size) : memory_(data), size_(size) {}

  Owned<void*, cudaFreeHost> memory_;
  size_t size_ = 0;
};

// Hands out aligned parts of one allocation; with a null base it only measures.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}

  template <typename T>
  T* Take(int64_t count) {
    const int64_t offset = offset_;
    offset_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  int64_t bytes() const { return offset_; }

 private:
  static constexpr int64_t kAlign = 1024;  // wgmma's shared-memory tiles mirror this alignment

  std::byte* base_;
  int64_t offset_ = 0;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CUDA_RAII_H_
