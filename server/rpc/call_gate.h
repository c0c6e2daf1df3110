// Counts the calls in progress and, when the server drains, refuses new ones.
#ifndef MMFREE_SERVER_RPC_CALL_GATE_H_
#define MMFREE_SERVER_RPC_CALL_GATE_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace mmfree {

// Thread-safe.
class CallGate {
 public:
  // Every call starts with Enter and ends with Leave, whether it is admitted or not.
  // UNAVAILABLE + RetryInfo once the gate is closed.
  absl::Status Enter();
  void Leave();

  void Close();
  bool closed() const;
  // Waits until every call has left; false when some have not by `deadline`.
  bool AwaitEmpty(absl::Time deadline);

 private:
  mutable absl::Mutex mu_;
  int64_t calls_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_CALL_GATE_H_
