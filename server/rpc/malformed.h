// What a request is answered that is no message of its type: gRPC itself says UNIMPLEMENTED,
// without a word.
#ifndef MMFREE_SERVER_RPC_MALFORMED_H_
#define MMFREE_SERVER_RPC_MALFORMED_H_

#include <grpcpp/impl/rpc_service_method.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/rpc/environment.h"
#include "server/rpc/status.h"
#include "server/rpc/stream_error.h"
#include "server/rpc/unary_call.h"

namespace mmfree {

inline absl::Status MalformedStatus() {
  return InvalidField("request",
                      "cannot be parsed: it is cut short, or not of this type, or one of its "
                      "strings is not valid UTF-8");
}

// Passes requests that can be parsed to one handler and the others to another of the same type,
// which must not look at its request.
class ParsingHandler final : public grpc::internal::MethodHandler {
 public:
  ParsingHandler(std::unique_ptr<MethodHandler> parsed, std::unique_ptr<MethodHandler> malformed)
      : parsed_(std::move(parsed)), malformed_(std::move(malformed)) {}

  void* Deserialize(grpc_call* call, grpc_byte_buffer* request, grpc::Status* status,
                    void** handler_data) override {
    return parsed_->Deserialize(call, request, status, handler_data);
  }

  void RunHandler(const HandlerParameter& p) override {
    if (p.status.ok()) {
      parsed_->RunHandler(p);
    } else {
      malformed_->RunHandler(HandlerParameter(p.call, p.server_context, p.request, grpc::Status::OK,
                                              p.internal_data, p.call_requester));
    }
  }

 private:
  const std::unique_ptr<MethodHandler> parsed_;
  const std::unique_ptr<MethodHandler> malformed_;
};

// A generated callback service `Base` whose methods answer INVALID_ARGUMENT with details to what
// cannot be parsed. The derived class names them all in its constructor.
template <typename Base>
class ParsingService : public Base {
 protected:
  explicit ParsingService(const RpcEnvironment* env) : env_(env) {}

  // `index`: the method's place in its service; `name` is a literal.
  template <typename Service, typename Request, typename Response>
  void Answer(int index, absl::string_view name,
              grpc::ServerUnaryReactor* (Service::*method)(grpc::CallbackServerContext*,
                                                           const Request*, Response*)) {
    using Handler = grpc::internal::CallbackUnaryHandler<Request, Response>;
    Mark<Handler>(
        index,
        [this, method](grpc::CallbackServerContext* context, const Request* request,
                       Response* response) {
          return (static_cast<Service*>(this)->*method)(context, request, response);
        },
        [this, name](grpc::CallbackServerContext* context, const Request*, Response*) {
          return RunUnary(env_, name, context, DuringDrain::kAnswer, 0, MalformedStatus);
        });
  }

  template <typename Service, typename Request, typename Response>
  void Answer(int index, absl::string_view name,
              grpc::ServerWriteReactor<Response>* (Service::*method)(grpc::CallbackServerContext*,
                                                                     const Request*)) {
    using Handler = grpc::internal::CallbackServerStreamingHandler<Request, Response>;
    Mark<Handler>(
        index,
        [this, method](grpc::CallbackServerContext* context, const Request* request) {
          return (static_cast<Service*>(this)->*method)(context, request);
        },
        [this, name](grpc::CallbackServerContext* context, const Request*) {
          return StreamError<Response>(env_, name, context, MalformedStatus());
        });
  }

  const RpcEnvironment* const env_;

 private:
  template <typename Handler, typename Parsed, typename Malformed>
  void Mark(int index, Parsed parsed, Malformed malformed) {
    this->MarkMethodCallback(index,
                             new ParsingHandler(std::make_unique<Handler>(std::move(parsed)),
                                                std::make_unique<Handler>(std::move(malformed))));
  }
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_MALFORMED_H_
