// Whether a session store can be used: from what its calls and probes of it say.
#ifndef MMFREE_SERVER_SESSIONS_STORE_HEALTH_H_
#define MMFREE_SERVER_SESSIONS_STORE_HEALTH_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace mmfree {

// Reads and writes fail apart: a full disk or a read-only replica still reads. So a read that works
// says nothing of writes, while a write that works says both. After a failure probes follow each
// other with a growing pause, and are as large as what could not be written: a full disk often has
// room for a little. Not thread-safe; times are the caller's.
class StoreHealth {
 public:
  struct Options {
    // Between a write that worked and the probe that follows unless another one does.
    absl::Duration interval = absl::Seconds(10);
    absl::Duration first_retry = absl::Milliseconds(200);  // after a failure, doubling up to
    absl::Duration max_retry = absl::Seconds(5);           // this
  };
  static constexpr int64_t kProbeBytes = 4096;

  enum class Call : uint8_t {
    kRead,
    kRemove,  // a write that may work where nothing can be added
    kWrite,
  };

  // The first probe is due at once.
  StoreHealth(const Options& options, absl::Time now) : options_(options), next_probe_(now) {}

  // A call ended with `status`, which was to write `bytes`. UNAVAILABLE is a failure; the other
  // codes are answers about a session.
  void Note(Call call, const absl::Status& status, int64_t bytes, absl::Time now);
  // A probe ended with `status`; every error is a failure.
  void NoteProbe(const absl::Status& status, absl::Time now);

  // True until something fails.
  bool usable() const { return !reads_fail_ && !writes_fail_; }
  // When the next probe is due, and the bytes that it is to write.
  absl::Time next_probe() const { return next_probe_; }
  int64_t probe_bytes() const { return probe_bytes_; }

 private:
  void Works(absl::Time now);

  const Options options_;
  bool reads_fail_ = false;
  bool writes_fail_ = false;
  absl::Duration retry_;
  absl::Time next_probe_;
  int64_t probe_bytes_ = kProbeBytes;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_STORE_HEALTH_H_
