// What may be in the system at all.
#ifndef MMFREE_SERVER_SCHEDULER_ADMISSION_CONTROL_H_
#define MMFREE_SERVER_SCHEDULER_ADMISSION_CONTROL_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "server/scheduler/priority.h"

namespace mmfree {

// Every request that was admitted is counted until it ends, so the queue bound is exact: with a
// free slot a request is never refused because others are about to take theirs. Not thread-safe.
class AdmissionControl {
 public:
  struct Options {
    int32_t capacity = 0;          // requests that can run at once
    int32_t max_queue = 0;         // requests beyond those
    int64_t max_queue_tokens = 0;  // prompt tokens of requests that wait for their first step
  };

  // How many are where, by class.
  struct Counts {
    std::array<int64_t, kNumPriorities> waiting{};  // for their first slot
    std::array<int64_t, kNumPriorities> running{};  // holding one
    std::array<int64_t, kNumPriorities> evicted{};  // started; preempted or parked
    int64_t waiting_tokens = 0;
  };

  explicit AdmissionControl(const Options& options) : options_(options) {}

  // Counts `requests` of a class as waiting, all or none, or RESOURCE_EXHAUSTED naming the limit;
  // INVALID_ARGUMENT when the prompt alone exceeds it, so that no retry can help.
  absl::Status Admit(Priority priority, int64_t prompt_tokens, int64_t requests = 1);

  // Adds what the step thread saw move: the change of each count.
  void Apply(const Counts& changes);

  int64_t waiting() const { return Sum(counts_.waiting); }
  int64_t running() const { return Sum(counts_.running); }
  int64_t evicted() const { return Sum(counts_.evicted); }
  int64_t waiting_tokens() const { return counts_.waiting_tokens; }
  bool empty() const { return waiting() + running() + evicted() == 0; }

 private:
  static int64_t Sum(const std::array<int64_t, kNumPriorities>& counts) {
    int64_t sum = 0;
    for (const int64_t count : counts) sum += count;
    return sum;
  }

  const Options options_;
  Counts counts_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_ADMISSION_CONTROL_H_
