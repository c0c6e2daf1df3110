#include "server/sessions/store_health.h"

#include <algorithm>

namespace mmfree {

void StoreHealth::Note(Call call, const absl::Status& status, int64_t bytes, absl::Time now) {
  if (absl::IsUnavailable(status)) {
    if (usable()) {
      retry_ = options_.first_retry;
      next_probe_ = now + retry_;
    }
    (call == Call::kRead ? reads_fail_ : writes_fail_) = true;
    probe_bytes_ = std::max(probe_bytes_, bytes);
  } else if (call == Call::kWrite && status.ok()) {
    Works(now);
  } else {
    reads_fail_ = false;
  }
}

void StoreHealth::NoteProbe(const absl::Status& status, absl::Time now) {
  if (status.ok()) {
    Works(now);
    return;
  }
  retry_ = usable() ? options_.first_retry : std::min(2 * retry_, options_.max_retry);
  next_probe_ = now + retry_;
  reads_fail_ = true;
  writes_fail_ = true;
}

void StoreHealth::Works(absl::Time now) {
  reads_fail_ = false;
  writes_fail_ = false;
  probe_bytes_ = kProbeBytes;
  next_probe_ = now + options_.interval;
}

}  // namespace mmfree
