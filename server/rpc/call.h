// What every call does around its work: admission, accounting, and the deadline.
#ifndef MMFREE_SERVER_RPC_CALL_H_
#define MMFREE_SERVER_RPC_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/rpc/environment.h"

namespace mmfree {

// One RPC from its arrival to OnDone. Not thread-safe, except that the handler's threads follow one
// another.
class Call {
 public:
  // `method` is a literal, e.g. "Generate".
  Call(const RpcEnvironment* env, absl::string_view method,
       const grpc::CallbackServerContext& context);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Whether the call may go on: UNAVAILABLE when draining, DEADLINE_EXCEEDED when it came too late.
  const absl::Status& admission() const { return admission_; }
  absl::Time deadline() const { return deadline_; }
  // Who calls, for fair shares and sessions: the names in the client's certificate, empty
  // without one.
  const std::string& caller() const { return caller_; }
  // For a call that gRPC reports as cancelled: whether its deadline did it. Deadlines are rounded
  // to milliseconds on their way here, so that one can be over in gRPC just before it is on our
  // clock.
  bool deadline_passed() const { return env_->clock->Now() >= deadline_ - kDeadlineRounding; }
  // What a call that gRPC reports as cancelled ends with: its deadline or its client did it.
  absl::Status CancelStatus() const {
    return deadline_passed() ? absl::DeadlineExceededError("the deadline passed")
                             : absl::CancelledError("the client is gone");
  }
  const RpcEnvironment& env() const { return *env_; }

  // Counts the outcome and makes it the RPC's status. Once per call.
  grpc::Status Finish(const absl::Status& status);

  // Runs `work` here when it is about `text_bytes` of text that are quick to handle, otherwise on
  // the worker pool. RESOURCE_EXHAUSTED + RetryInfo when that is full.
  absl::Status Run(size_t text_bytes, std::function<void()> work);

 private:
  static constexpr absl::Duration kDeadlineRounding = absl::Milliseconds(10);

  const RpcEnvironment* const env_;
  const absl::string_view method_;
  const absl::Time deadline_;
  const std::string caller_;
  absl::Status admission_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_CALL_H_
