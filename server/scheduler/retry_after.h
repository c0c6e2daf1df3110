// An estimate that goes with a refusal, as a payload of its status.
#ifndef MMFREE_SERVER_SCHEDULER_RETRY_AFTER_H_
#define MMFREE_SERVER_SCHEDULER_RETRY_AFTER_H_

#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace mmfree {

// When it makes sense to try again: from now, finite. Replaces an earlier one; `status` is an
// error.
void SetRetryAfter(absl::Duration delay, absl::Status* status);

// Takes it off again; nothing when there was none.
std::optional<absl::Duration> TakeRetryAfter(absl::Status* status);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_RETRY_AFTER_H_
