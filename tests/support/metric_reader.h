// Reads one value out of a registry, as a scrape would.
#ifndef MMFREE_TESTS_SUPPORT_METRIC_READER_H_
#define MMFREE_TESTS_SUPPORT_METRIC_READER_H_

#include <prometheus/registry.h>

#include <string>

namespace mmfree {

// Sum over the series of family `name` that have the label `key`="value" (all of them when `key` is
// empty): a counter's or gauge's value, or a histogram's number of observations. -1 when there is
// no such series.
inline double MetricValue(const prometheus::Registry& registry, const std::string& name,
                          const std::string& key = "", const std::string& value = "") {
  double sum = 0;
  bool found = false;
  for (const prometheus::MetricFamily& family : registry.Collect()) {
    if (family.name != name) continue;
    for (const prometheus::ClientMetric& metric : family.metric) {
      bool matches = key.empty();
      for (const prometheus::ClientMetric::Label& label : metric.label) {
        matches = matches || (label.name == key && label.value == value);
      }
      if (!matches) continue;
      found = true;
      sum += metric.counter.value + metric.gauge.value +
             static_cast<double>(metric.histogram.sample_count);
    }
  }
  return found ? sum : -1;
}

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_METRIC_READER_H_
