// The standard process_* metrics of this process, read from /proc/self at each scrape.
#ifndef MMFREE_SERVER_METRICS_PROCESS_METRICS_H_
#define MMFREE_SERVER_METRICS_PROCESS_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <vector>

namespace mmfree {

// Resident and virtual memory (bytes), CPU time and start time (seconds), open and allowed file
// descriptors, threads. What cannot be read is left out. Thread-safe.
class ProcessMetrics final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_PROCESS_METRICS_H_
