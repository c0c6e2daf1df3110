// Unary RPCs that only compute: no engine request, nothing to cancel.
#ifndef MMFREE_SERVER_RPC_UNARY_CALL_H_
#define MMFREE_SERVER_RPC_UNARY_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstddef>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/rpc/environment.h"

namespace mmfree {

// Whether a draining server still answers.
enum class DuringDrain { kRefuse, kAnswer };

// Runs `work`, which fills in the response, and finishes the RPC with its status. Large requests
// (`input_bytes`) run on the worker pool. Returns a reactor that owns itself.
grpc::ServerUnaryReactor* RunUnary(const RpcEnvironment* env, absl::string_view method,
                                   grpc::CallbackServerContext* context, DuringDrain during_drain,
                                   size_t input_bytes, std::function<absl::Status()> work);

// Runs `work`, which may block on the session store, on a session thread; it is given the caller's
// identity. RESOURCE_EXHAUSTED + RetryInfo when too many calls wait for one.
grpc::ServerUnaryReactor* RunOnSessionThread(
    const RpcEnvironment* env, absl::string_view method, grpc::CallbackServerContext* context,
    std::function<absl::Status(const std::string& caller)> work);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_UNARY_CALL_H_
