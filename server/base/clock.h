// Time as a dependency, so that policies and time-outs are tested without sleeping.
#ifndef MMFREE_SERVER_BASE_CLOCK_H_
#define MMFREE_SERVER_BASE_CLOCK_H_

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace mmfree {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;

  // The system's clock; never destroyed.
  static const Clock* Real() {
    class RealClock final : public Clock {
     public:
      absl::Time Now() const override { return absl::Now(); }
    };
    static const RealClock* const clock = new RealClock;
    return clock;
  }
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_CLOCK_H_
