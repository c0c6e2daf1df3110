// How long a request that arrives now waits for its first step: from the work that is ahead of it.
#ifndef MMFREE_SERVER_SCHEDULER_WORK_AHEAD_H_
#define MMFREE_SERVER_SCHEDULER_WORK_AHEAD_H_

#include <array>
#include <cstdint>

#include "absl/time/time.h"
#include "server/scheduler/priority.h"
#include "server/scheduler/prompt_size.h"

namespace mmfree {

// What requests have still to do. Those whose readers lag are left out: whoever waits may take
// their slots. A sum over requests, exact for steps of at most kMaxExpectedSteps, so that it is
// kept by adding and subtracting, and returns to zero.
struct Work {
  int64_t waiting = 0;  // requests without a slot
  int64_t running = 0;  // requests with one
  // Steps that they will take once their prompts are fed, as far as can be told; one at least each.
  int64_t waiting_steps = 0;
  int64_t open_steps = 0;  // of these, those that they may end without
  int64_t running_steps = 0;
  double running_squares = 0;  // of each running one's steps
  int64_t prompt_tokens = 0;   // to be fed, of both

  // `count` is 1 or -1.
  void AddWaiting(int64_t steps, int64_t open, int count) {
    waiting += count;
    waiting_steps += count * steps;
    open_steps += count * open;
  }
  void AddRunning(int64_t steps, int count) {
    running += count;
    running_steps += count * steps;
    running_squares += count * (static_cast<double>(steps) * static_cast<double>(steps));
  }
  Work& operator+=(const Work& other);
};
inline constexpr int64_t kMaxExpectedSteps = 1 << 20;

// By the size of what is left of their prompts (prompt_size.h).
using ClassWork = std::array<Work, kNumPromptSizes>;
using WorkByClass = std::array<ClassWork, kNumPriorities>;

// What steps cost at present.
struct StepCosts {
  absl::Duration step;          // of all kinds
  absl::Duration decode_step;   // without prompts
  absl::Duration prompt_token;  // what one adds to a step
  int64_t prompt_budget = 1;    // prompt tokens of a step with decoding rows
  double used = 1;              // of the steps that a request may end without, those that it takes
};

// Until a request of this class and size of prompt that arrives now gets its first step, when
// `capacity` requests can run at once. Lower classes, and longer prompts of its own, count for
// nothing: they wait behind it or give way. Always finite.
absl::Duration EstimateWait(const WorkByClass& work, Priority priority, int size, int32_t capacity,
                            const StepCosts& costs);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_WORK_AHEAD_H_
