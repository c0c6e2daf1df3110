// Latencies in bounded memory, whatever their number.
#ifndef MMFREE_CLIENT_LOAD_HISTOGRAM_H_
#define MMFREE_CLIENT_LOAD_HISTOGRAM_H_

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace mmfree {

// Buckets a hundredth apart from 1 us to about 3 hours; what is outside counts in the first or the
// last. Not thread-safe.
class Histogram {
 public:
  Histogram();

  void Add(absl::Duration value, int64_t count = 1);

  int64_t count() const { return count_; }
  absl::Duration max() const { return max_; }
  // The least value that a share `quantile` in (0, 1] does not exceed, to 1 %, and never above
  // max(); zero when empty.
  absl::Duration Quantile(double quantile) const;

 private:
  std::vector<int64_t> buckets_;
  int64_t count_ = 0;
  absl::Duration max_;
};

}  // namespace mmfree

#endif  // MMFREE_CLIENT_LOAD_HISTOGRAM_H_
