// What a step takes and how often a request leaves: the measurements behind the estimated wait.
#ifndef MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
#define MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_

#include <algorithm>
#include <cstdint>

#include "absl/time/time.h"

namespace mmfree {

// Exponential averages over busy time, so that idle hours do not count. Not thread-safe.
class Throughput {
 public:
  // A step took `time`, and `left` requests ended since the one before.
  void Observe(absl::Duration time, int64_t left) {
    step_ = Blend(step_, time);
    since_departure_ += time;
    if (left == 0) return;
    per_departure_ = Blend(per_departure_, since_departure_ / left);
    since_departure_ = absl::ZeroDuration();
  }

  // How long a request that arrives now waits for its first step to end, when `departures` others
  // have to end first to leave it a slot. A departure that is outstanding for longer than the
  // average counts as long as it has taken.
  absl::Duration EstimatedWait(int64_t departures) const {
    return std::max(per_departure_, since_departure_) * departures + step_;
  }

 private:
  static absl::Duration Blend(absl::Duration average, absl::Duration sample) {
    return average == absl::ZeroDuration() ? sample : average + (sample - average) / 16;
  }

  absl::Duration step_;
  absl::Duration per_departure_;
  absl::Duration since_departure_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
