// What plain reads of a GPU's memory reach: the limit that decode steps are held against. For the
// benchmarks; the server does not link it.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_READ_BANDWIDTH_H_
#define MMFREE_SERVER_BACKENDS_CUDA_READ_BANDWIDTH_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace mmfree {

// A buffer on the device and a kernel that adds up all of it, 16 bytes a load.
class GpuReadBandwidth {
 public:
  // `bytes`: far more than the device's L2 cache. INTERNAL when the device refuses.
  static absl::StatusOr<std::unique_ptr<GpuReadBandwidth>> Create(int32_t device, int64_t bytes);
  virtual ~GpuReadBandwidth() = default;

  // Reads the buffer once, timed by events; bytes per second, 0 after a device error.
  virtual double Measure() = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BACKENDS_CUDA_READ_BANDWIDTH_H_
