#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/read_bandwidth.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

using cuda::DeviceBuffer;
using cuda::Event;

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 4;
constexpr int kLoads = 8;  // in flight, a thread

// words [count]; sums [blocks * threads], so that the reads are not optimised away.
__global__ void __launch_bounds__(kThreads)
    SumKernel(const uint4* words, int64_t count, uint32_t* sums) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  uint32_t sum = 0;
  for (int64_t base = first; base < count; base += kLoads * stride) {
    uint4 loaded[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (base + i * stride < count) loaded[i] = __ldcs(words + base + i * stride);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
  }
  sums[first] = sum;
}

class GpuReadBandwidthImpl final : public GpuReadBandwidth {
 public:
  absl::Status Initialize(int32_t device, int64_t bytes) {
    device_ = device;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaSetDevice(device));
    cudaDeviceProp properties;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
    blocks_ = kBlocksPerSm * properties.multiProcessorCount;
    count_ = std::max<int64_t>(bytes, 4 * int64_t{properties.l2CacheSize}) / 16;
    MMFREE_ASSIGN_OR_RETURN(words_, DeviceBuffer::Allocate(static_cast<size_t>(count_) * 16));
    MMFREE_ASSIGN_OR_RETURN(
        sums_, DeviceBuffer::Allocate(static_cast<size_t>(blocks_) * kThreads * sizeof(uint32_t)));
    // Not zeros: memory of one value can be faster than memory of any.
    MMFREE_CUDA_RETURN_IF_ERROR(cudaMemset(words_.data(), 0x5a, words_.size()));
    cudaEvent_t event = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event));
    start_ = Event(event);
    MMFREE_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event));
    end_ = Event(event);
    return absl::OkStatus();
  }

  double Measure() override {
    float milliseconds = 0.0f;
    cudaError_t error = cudaSetDevice(device_);
    if (error == cudaSuccess) error = cudaEventRecord(start_.get());
    if (error == cudaSuccess) {
      SumKernel<<<blocks_, kThreads>>>(reinterpret_cast<const uint4*>(words_.data()), count_,
                                       reinterpret_cast<uint32_t*>(sums_.data()));
      error = cudaGetLastError();
    }
    if (error == cudaSuccess) error = cudaEventRecord(end_.get());
    if (error == cudaSuccess) error = cudaEventSynchronize(end_.get());
    if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, start_.get(), end_.get());
    if (error != cudaSuccess || milliseconds <= 0.0f) return 0.0;
    return static_cast<double>(count_) * 16.0 / (milliseconds * 1e-3);
  }

 private:
  int32_t device_ = 0;
  int blocks_ = 0;
  int64_t count_ = 0;  // of 16 bytes
  DeviceBuffer words_;
  DeviceBuffer sums_;
  Event start_;
  Event end_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuReadBandwidth>> GpuReadBandwidth::Create(int32_t device,
                                                                           int64_t bytes) {
  auto probe = std::make_unique<GpuReadBandwidthImpl>();
  MMFREE_RETURN_IF_ERROR(probe->Initialize(device, bytes));
  return probe;
}

}  // namespace mmfree
