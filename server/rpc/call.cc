#include "server/rpc/call.h"

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "server/rpc/conversion.h"
#include "server/rpc/status.h"

namespace mmfree {
namespace {

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const std::chrono::system_clock::time_point deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// A certificate may hold several names; they come in its order.
std::string CallerOf(const grpc::CallbackServerContext& context) {
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth == nullptr || !auth->IsPeerAuthenticated()) return "";
  const std::vector<grpc::string_ref> identity = auth->GetPeerIdentity();
  return identity.empty() ? "" : std::string(identity.front().data(), identity.front().size());
}

}  // namespace

Call::Call(const RpcEnvironment* env, absl::string_view method,
           const grpc::CallbackServerContext& context)
    : env_(env),
      method_(method),
      deadline_(DeadlineOf(context)),
      caller_(CallerOf(context)),
      admission_(env->gate->Enter()) {
  if (admission_.ok() && env_->clock->Now() >= deadline_) {
    admission_ = absl::DeadlineExceededError("the deadline had passed when the request arrived");
  }
}

Call::~Call() { env_->gate->Leave(); }

grpc::Status Call::Finish(const absl::Status& status) {
  env_->metrics->CountRpc(method_, StatusCodeName(status.code()));
  return ToGrpcStatus(status);
}

absl::Status Call::Run(size_t text_bytes, std::function<void()> work) {
  if (text_bytes <= kInlineTextBytes) {
    work();
    return absl::OkStatus();
  }
  if (env_->workers->Schedule(std::move(work))) return absl::OkStatus();
  return WithRetryDelay(
      absl::ResourceExhaustedError("too many large texts are waiting to be tokenized"),
      absl::Seconds(1));
}

}  // namespace mmfree
