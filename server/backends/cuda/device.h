// Choosing and describing a CUDA device.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_DEVICE_H_
#define MMFREE_SERVER_BACKENDS_CUDA_DEVICE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace mmfree::cuda {

struct DeviceInfo {
  int32_t ordinal = 0;
  std::string name;
  int32_t compute_capability = 0;  // 90 for 9.0
  int32_t num_sms = 0;
  int64_t shared_bytes_per_block = 0;  // what a kernel can opt in to
  int64_t total_bytes = 0;
  // The kernels that need compute capability 9.0 exactly (wgmma) can run.
  bool hopper = false;
};

// Checks that the driver, the device and a kernel of this build work together, and makes the device
// the calling thread's current one. Errors as CreateCudaBackend.
absl::StatusOr<DeviceInfo> OpenDevice(int32_t ordinal);

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_DEVICE_H_
