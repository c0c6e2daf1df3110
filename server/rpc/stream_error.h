// Streaming RPCs that end before they begin.
#ifndef MMFREE_SERVER_RPC_STREAM_ERROR_H_
#define MMFREE_SERVER_RPC_STREAM_ERROR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/rpc/call.h"
#include "server/rpc/environment.h"

namespace mmfree {

// Ends the RPC with `status`, an error, and counts it. Returns a reactor that owns itself.
template <typename Response>
grpc::ServerWriteReactor<Response>* StreamError(const RpcEnvironment* env, absl::string_view method,
                                                grpc::CallbackServerContext* context,
                                                const absl::Status& status) {
  class Reactor final : public grpc::ServerWriteReactor<Response> {
   public:
    Reactor(const RpcEnvironment* env, absl::string_view method,
            const grpc::CallbackServerContext& context, const absl::Status& status)
        : call_(env, method, context) {
      this->Finish(call_.Finish(status));
    }
    void OnDone() override { delete this; }

   private:
    Call call_;
  };
  return new Reactor(env, method, *context, status);
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_STREAM_ERROR_H_
