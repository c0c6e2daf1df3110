#include "server/metrics/prefix_cache_metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

namespace mmfree {
namespace {

class PrefixCacheMetricsImpl final : public PrefixCacheMetrics {
 public:
  explicit PrefixCacheMetricsImpl(prometheus::Registry& registry)
      : bytes_(prometheus::BuildGauge()
                   .Name("mmfree_prefix_cache_bytes")
                   .Help("What the prefix cache holds, with its tokens and overhead. Unit: bytes.")
                   .Register(registry)
                   .Add({})),
        checkpoints_(prometheus::BuildGauge()
                         .Name("mmfree_prefix_cache_checkpoints")
                         .Help("States that the prefix cache holds. Unit: states.")
                         .Register(registry)
                         .Add({})),
        evictions_(prometheus::BuildCounter()
                       .Name("mmfree_prefix_cache_evictions_total")
                       .Help("States that left the prefix cache to keep it within its budget. "
                             "Unit: states.")
                       .Register(registry)
                       .Add({})) {}

  void SetBytes(int64_t bytes) override { bytes_.Set(static_cast<double>(bytes)); }
  void SetCheckpoints(int64_t checkpoints) override {
    checkpoints_.Set(static_cast<double>(checkpoints));
  }
  void CountEvictions(int64_t checkpoints) override {
    evictions_.Increment(static_cast<double>(checkpoints));
  }

 private:
  prometheus::Gauge& bytes_;
  prometheus::Gauge& checkpoints_;
  prometheus::Counter& evictions_;
};

}  // namespace

std::unique_ptr<PrefixCacheMetrics> PrefixCacheMetrics::Create(prometheus::Registry* registry) {
  return std::make_unique<PrefixCacheMetricsImpl>(*registry);
}

}  // namespace mmfree
