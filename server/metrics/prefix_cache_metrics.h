// Instruments of the prefix cache as a whole; what its hits spare is counted by model (metrics.h).
#ifndef MMFREE_SERVER_METRICS_PREFIX_CACHE_METRICS_H_
#define MMFREE_SERVER_METRICS_PREFIX_CACHE_METRICS_H_

#include <cstdint>
#include <memory>

namespace prometheus {
class Registry;
}

namespace mmfree {

// Thread-safe.
class PrefixCacheMetrics {
 public:
  // Registers every family in `registry`, which must outlive the metrics.
  static std::unique_ptr<PrefixCacheMetrics> Create(prometheus::Registry* registry);
  virtual ~PrefixCacheMetrics() = default;

  virtual void SetBytes(int64_t bytes) = 0;
  virtual void SetCheckpoints(int64_t checkpoints) = 0;
  virtual void CountEvictions(int64_t checkpoints) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_PREFIX_CACHE_METRICS_H_
