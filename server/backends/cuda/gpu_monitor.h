// Memory, utilisation, power and energy of a GPU through NVML, which comes with the driver and is
// loaded at run time.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_GPU_MONITOR_H_
#define MMFREE_SERVER_BACKENDS_CUDA_GPU_MONITOR_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/base/gpu_reading.h"

namespace mmfree {

// Thread-safe.
class GpuMonitor {
 public:
  // `device` as CudaBackendOptions::device. NOT_FOUND without NVML or such a device; INTERNAL with
  // NVML's words when it fails.
  static absl::StatusOr<std::unique_ptr<GpuMonitor>> Open(int32_t device);
  virtual ~GpuMonitor() = default;

  virtual const std::string& name() const = 0;  // "NVIDIA H200"
  // A few calls into the driver, tens of microseconds.
  virtual GpuReading Read() const = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BACKENDS_CUDA_GPU_MONITOR_H_
