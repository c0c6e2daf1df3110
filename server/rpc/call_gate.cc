#include "server/rpc/call_gate.h"

#include "server/rpc/status.h"

namespace mmfree {
namespace {

// Long enough for a load balancer to notice and for a replacement to start.
constexpr absl::Duration kDrainRetryDelay = absl::Seconds(1);

}  // namespace

absl::Status CallGate::Enter() {
  absl::MutexLock lock(&mu_);
  ++calls_;
  if (!closed_) return absl::OkStatus();
  return WithRetryDelay(
      absl::UnavailableError("the server is draining before it stops; try another one"),
      kDrainRetryDelay);
}

void CallGate::Leave() {
  absl::MutexLock lock(&mu_);
  --calls_;
}

void CallGate::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
}

bool CallGate::closed() const {
  absl::MutexLock lock(&mu_);
  return closed_;
}

bool CallGate::AwaitEmpty(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(
                                   +[](CallGate* gate) ABSL_EXCLUSIVE_LOCKS_REQUIRED(gate->mu_) {
                                     return gate->calls_ == 0;
                                   },
                                   this),
                               deadline);
}

}  // namespace mmfree
