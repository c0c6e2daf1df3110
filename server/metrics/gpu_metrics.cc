#include "server/metrics/gpu_metrics.h"

#include <optional>

namespace mmfree {
namespace {

struct Instrument {
  const char* name;
  const char* help;
  prometheus::MetricType type;
  std::optional<double> GpuReading::*value;
};

constexpr Instrument kInstruments[] = {
    {"mmfree_gpu_memory_used_bytes", "Memory of the GPU in use, by all programs. Unit: bytes.",
     prometheus::MetricType::Gauge, &GpuReading::memory_used_bytes},
    {"mmfree_gpu_memory_total_bytes", "Memory of the GPU. Unit: bytes.",
     prometheus::MetricType::Gauge, &GpuReading::memory_total_bytes},
    {"mmfree_gpu_utilization_ratio",
     "Share of the last sampling period with a kernel running. Unit: ratio, 0 to 1.",
     prometheus::MetricType::Gauge, &GpuReading::utilization},
    {"mmfree_gpu_power_watts", "Power drawn by the GPU. Unit: watts.",
     prometheus::MetricType::Gauge, &GpuReading::power_watts},
    {"mmfree_gpu_energy_joules_total",
     "Energy the GPU has used since its driver was loaded. Unit: joules.",
     prometheus::MetricType::Counter, &GpuReading::energy_joules},
};

}  // namespace

std::vector<prometheus::MetricFamily> GpuMetrics::Collect() const {
  std::vector<GpuReading> readings;
  readings.reserve(gpus_.size());
  for (const Gpu& gpu : gpus_) readings.push_back(gpu.read());
  std::vector<prometheus::MetricFamily> families;
  for (const Instrument& instrument : kInstruments) {
    prometheus::MetricFamily family;
    family.name = instrument.name;
    family.help = instrument.help;
    family.type = instrument.type;
    for (size_t i = 0; i < gpus_.size(); ++i) {
      const std::optional<double> value = readings[i].*instrument.value;
      if (!value.has_value()) continue;
      prometheus::ClientMetric metric;
      metric.label = {{"gpu", gpus_[i].index}, {"name", gpus_[i].name}};
      metric.counter.value = *value;
      metric.gauge.value = *value;
      family.metric.push_back(std::move(metric));
    }
    if (!family.metric.empty()) families.push_back(std::move(family));
  }
  return families;
}

}  // namespace mmfree
