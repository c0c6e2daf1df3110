// mmfree_gpu_* metrics, read from the devices at each scrape.
#ifndef MMFREE_SERVER_METRICS_GPU_METRICS_H_
#define MMFREE_SERVER_METRICS_GPU_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "server/base/gpu_reading.h"

namespace mmfree {

// Used and total memory (bytes), utilisation (ratio), power (watts) and energy (joules) of each GPU
// the server uses, by all programs on it. What a device does not tell is left out. Thread-safe.
class GpuMetrics final : public prometheus::Collectable {
 public:
  struct Gpu {
    std::string index;                 // label gpu: "0"
    std::string name;                  // label name: "NVIDIA H200"
    std::function<GpuReading()> read;  // called from any thread, as long as this object lives
  };

  explicit GpuMetrics(std::vector<Gpu> gpus) : gpus_(std::move(gpus)) {}

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::vector<Gpu> gpus_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_GPU_METRICS_H_
