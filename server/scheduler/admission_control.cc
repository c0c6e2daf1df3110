#include "server/scheduler/admission_control.h"

#include "absl/strings/str_cat.h"

namespace mmfree {

absl::Status AdmissionControl::Admit(Priority priority, int64_t prompt_tokens, int64_t requests) {
  if (prompt_tokens > options_.max_queue_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt has ", prompt_tokens, " tokens, more than the ",
                     options_.max_queue_tokens, " that may ever wait (--max_queue_tokens)"));
  }
  const int64_t present = waiting() + running() + evicted();
  if (present + requests > int64_t{options_.capacity} + options_.max_queue) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", present, " requests are admitted, of which ",
                     options_.capacity, " can run at once and ", options_.max_queue, " may wait"));
  }
  if (counts_.waiting_tokens + prompt_tokens > options_.max_queue_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the queue is full: ", counts_.waiting_tokens, " prompt tokens wait, a request of ",
        prompt_tokens, " would exceed the limit of ", options_.max_queue_tokens));
  }
  counts_.waiting[static_cast<size_t>(priority)] += requests;
  counts_.waiting_tokens += prompt_tokens;
  return absl::OkStatus();
}

void AdmissionControl::Apply(const Counts& changes) {
  for (size_t i = 0; i < kNumPriorities; ++i) {
    counts_.waiting[i] += changes.waiting[i];
    counts_.running[i] += changes.running[i];
    counts_.evicted[i] += changes.evicted[i];
  }
  counts_.waiting_tokens += changes.waiting_tokens;
}

}  // namespace mmfree
