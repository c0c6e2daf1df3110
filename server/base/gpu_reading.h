// What a GPU says of itself.
#ifndef MMFREE_SERVER_BASE_GPU_READING_H_
#define MMFREE_SERVER_BASE_GPU_READING_H_

#include <optional>

namespace mmfree {

// Of the whole device, by all programs on it. What the device does not tell is absent.
struct GpuReading {
  std::optional<double> memory_used_bytes;
  std::optional<double> memory_total_bytes;
  std::optional<double> utilization;  // share of the last sampling period with a kernel running
  std::optional<double> power_watts;
  std::optional<double> energy_joules;  // since the driver was loaded
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_GPU_READING_H_
