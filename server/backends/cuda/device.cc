#include "server/backends/cuda/device.h"

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/kernels.h"

namespace mmfree::cuda {
namespace {

// The oldest device the kernels are written for: int8 tensor cores, cp.async, redux.
constexpr int32_t kOldestComputeCapability = 80;

absl::Status DriverError(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      int runtime = 0;
      static_cast<void>(cudaDriverGetVersion(&driver));
      static_cast<void>(cudaRuntimeGetVersion(&runtime));
      if (driver == 0) return absl::NotFoundError("no CUDA driver is installed");
      return absl::FailedPreconditionError(absl::StrCat(
          "the CUDA driver is too old: it supports CUDA ", driver / 1000, ".", driver % 1000 / 10,
          ", this build needs ", runtime / 1000, ".", runtime % 1000 / 10));
    }
    case cudaErrorNoDevice:
      return absl::NotFoundError("no CUDA device is visible (see CUDA_VISIBLE_DEVICES)");
    default:
      return ToStatus(error, "cudaGetDeviceCount");
  }
}

}  // namespace

absl::StatusOr<DeviceInfo> OpenDevice(int32_t ordinal) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return DriverError(error);
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::NotFoundError(
        absl::StrCat("there is no CUDA device ", ordinal, ": ", count, " visible"));
  }
  cudaDeviceProp properties;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, ordinal));
  DeviceInfo info;
  info.ordinal = ordinal;
  info.name = properties.name;
  info.compute_capability = properties.major * 10 + properties.minor;
  info.num_sms = properties.multiProcessorCount;
  info.shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  if (info.compute_capability < kOldestComputeCapability) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA device ", ordinal, " (", info.name, ") has compute capability ",
                     properties.major, ".", properties.minor, "; this backend needs at least 8.0"));
  }
  MMFREE_CUDA_RETURN_IF_ERROR(cudaSetDevice(ordinal));
  const cudaError_t error = QueryKernelBuild(&info.hopper);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    static_cast<void>(cudaGetLastError());
    return absl::FailedPreconditionError(absl::StrCat(
        "this build has no kernels for CUDA device ", ordinal, " (", info.name,
        ", compute capability ", properties.major, ".", properties.minor,
        "); build with MMFREE_CUDA_ARCHITECTURES=",
        info.compute_capability == 90 ? "90a" : absl::StrCat(info.compute_capability)));
  }
  if (error != cudaSuccess) return ToStatus(error, "a first kernel");
  return info;
}

}  // namespace mmfree::cuda
