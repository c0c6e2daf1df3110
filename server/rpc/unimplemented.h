// RPCs of the protos that this version does not serve.
#ifndef MMFREE_SERVER_RPC_UNIMPLEMENTED_H_
#define MMFREE_SERVER_RPC_UNIMPLEMENTED_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/rpc/environment.h"
#include "server/rpc/stream_error.h"
#include "server/rpc/unary_call.h"

namespace mmfree {

inline absl::Status UnimplementedStatus(absl::string_view method) {
  return absl::UnimplementedError(
      absl::StrCat(method, " is not implemented by this version of the server"));
}

inline grpc::ServerUnaryReactor* Unimplemented(const RpcEnvironment* env, absl::string_view method,
                                               grpc::CallbackServerContext* context) {
  return RunUnary(env, method, context, DuringDrain::kAnswer, 0,
                  [method] { return UnimplementedStatus(method); });
}

template <typename Response>
grpc::ServerWriteReactor<Response>* UnimplementedStream(const RpcEnvironment* env,
                                                        absl::string_view method,
                                                        grpc::CallbackServerContext* context) {
  return StreamError<Response>(env, method, context, UnimplementedStatus(method));
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_UNIMPLEMENTED_H_
