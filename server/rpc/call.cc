#include "server/rpc/call.h"

#include <grpc/grpc_security_constants.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "server/rpc/conversion.h"
#include "server/rpc/status.h"

namespace mmfree {
namespace {

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const std::chrono::system_clock::time_point deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// All names in the certificate, each once: its common name, then the alternative ones in its order.
// Callers that have but one of them in common ("localhost", say) are not the same.
std::string CallerOf(const grpc::CallbackServerContext& context) {
  const std::shared_ptr<const grpc::AuthContext> auth = context.auth_context();
  if (auth == nullptr || !auth->IsPeerAuthenticated()) return "";
  std::vector<std::string> names;
  for (const char* property : {GRPC_X509_CN_PROPERTY_NAME, GRPC_X509_SAN_PROPERTY_NAME}) {
    for (const grpc::string_ref& value : auth->FindPropertyValues(property)) {
      std::string name = absl::StrReplaceAll(absl::string_view(value.data(), value.size()),
                                             {{"%", "%25"}, {",", "%2C"}});
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        names.push_back(std::move(name));
      }
    }
  }
  return absl::StrJoin(names, ",");
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
