#include "server/rpc/unary_call.h"

#include <utility>

#include "server/rpc/call.h"
#include "server/rpc/session_conversion.h"

namespace mmfree {
namespace {

class UnaryReactor final : public grpc::ServerUnaryReactor {
 public:
  UnaryReactor(const RpcEnvironment* env, absl::string_view method,
               const grpc::CallbackServerContext& context, std::function<absl::Status()> work)
      : call_(env, method, context), work_(std::move(work)) {}

  void Start(DuringDrain during_drain, size_t input_bytes) {
    absl::Status status = call_.admission();
    if (during_drain == DuringDrain::kAnswer && absl::IsUnavailable(status)) {
      status = absl::OkStatus();
    }
    if (status.ok()) {
      status = call_.Run(input_bytes, [this] { Finish(call_.Finish(work_())); });
      if (status.ok()) return;
    }
    Finish(call_.Finish(status));
  }

  void OnDone() override { delete this; }

 private:
  Call call_;
  const std::function<absl::Status()> work_;
};

class SessionThreadReactor final : public grpc::ServerUnaryReactor {
 public:
  SessionThreadReactor(const RpcEnvironment* env, absl::string_view method,
                       const grpc::CallbackServerContext& context,
                       std::function<absl::Status(const std::string&)> work)
      : call_(env, method, context), work_(std::move(work)) {}

  void Start() {
    absl::Status status = call_.admission();
    if (status.ok() && !call_.env().session_threads->Schedule([this] {
          Finish(call_.Finish(WithStoreRetryDelay(work_(call_.caller()))));
        })) {
      status = SessionThreadsBusy();
    }
    if (!status.ok()) Finish(call_.Finish(status));
  }

  void OnDone() override { delete this; }

 private:
  Call call_;
  const std::function<absl::Status(const std::string&)> work_;
};

}  // namespace

grpc::ServerUnaryReactor* RunOnSessionThread(
    const RpcEnvironment* env, absl::string_view method, grpc::CallbackServerContext* context,
    std::function<absl::Status(const std::string& caller)> work) {
  auto* const reactor = new SessionThreadReactor(env, method, *context, std::move(work));
  reactor->Start();
  return reactor;
}

grpc::ServerUnaryReactor* RunUnary(const RpcEnvironment* env, absl::string_view method,
                                   grpc::CallbackServerContext* context, DuringDrain during_drain,
                                   size_t input_bytes, std::function<absl::Status()> work) {
  auto* const reactor = new UnaryReactor(env, method, *context, std::move(work));
  reactor->Start(during_drain, input_bytes);
  return reactor;
}

}  // namespace mmfree
