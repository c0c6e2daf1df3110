#include "server/rpc/create_session_handler.h"

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/status_macros.h"
#include "server/rpc/admissible.h"
#include "server/rpc/call.h"
#include "server/rpc/conversion.h"
#include "server/rpc/session_conversion.h"
#include "server/rpc/status.h"
#include "server/rpc/turn.h"
#include "server/rpc/validation.h"

namespace mmfree {
namespace {

// Owns itself: gRPC calls OnDone last.
class CreateSessionReactor final : public grpc::ServerUnaryReactor {
 public:
  CreateSessionReactor(const RpcEnvironment* env, const grpc::CallbackServerContext& context,
                       const v1::CreateSessionRequest* request, v1::CreateSessionResponse* response)
      : call_(env, "CreateSession", context), request_(request), response_(response) {}

  void Start() {
    absl::Status status = call_.admission();
    if (status.ok() && !call_.env().session_threads->Schedule([this] { Prepare(); })) {
      status = SessionThreadsBusy();
    }
    if (!status.ok()) Finish(call_.Finish(status));
  }

  void OnCancel() override {
    std::shared_ptr<Prefill> prefill;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      prefill = prefill_;
    }
    // When its deadline passes the engine ends a request on its own, with the right status.
    if (prefill != nullptr && !call_.deadline_passed()) prefill->Cancel();
  }

  void OnDone() override { delete this; }

 private:
  // The prompt's run. Held by the engine and by whoever submits, so it outlives the reactor, which
  // may be gone as soon as the run has ended.
  class Prefill final : public GenerationSink {
   public:
    Prefill(CreateSessionReactor* reactor, Engine* engine) : reactor_(reactor), engine_(engine) {}

    static absl::Status Submit(const std::shared_ptr<Prefill>& self, GenerationRequest request) {
      MMFREE_ASSIGN_OR_RETURN(const RequestHandle handle,
                              self->engine_->Submit(std::move(request), self));
      bool cancelled;
      {
        absl::MutexLock lock(&self->mu_);
        self->handle_ = handle;
        cancelled = self->cancelled_;
      }
      if (cancelled) self->engine_->Cancel(handle);
      return absl::OkStatus();
    }

    void Cancel() {
      std::optional<RequestHandle> handle;
      {
        absl::MutexLock lock(&mu_);
        cancelled_ = true;
        handle = handle_;
      }
      if (handle.has_value()) engine_->Cancel(*handle);
    }

    void OnTokens(absl::Span<const SampledToken>) override {}
    void OnFinished(const absl::StatusOr<GenerationResult>& result) override {
      reactor_->OnPromptDone(result.status());
    }
    size_t backlog() const override { return 0; }

   private:
    CreateSessionReactor* const reactor_;
    Engine* const engine_;
    absl::Mutex mu_;
    bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
    std::optional<RequestHandle> handle_ ABSL_GUARDED_BY(mu_);
  };

  // On a session thread. The RPC is finished by who has the last part of the work.
  void Prepare() {
    const absl::Status status = TryPrepare();
    if (!status.ok()) Finish(call_.Finish(WithStoreRetryDelay(status)));
  }

  absl::Status TryPrepare() {
    MMFREE_ASSIGN_OR_RETURN(sessions_, SessionsOf(call_.env()));
    MMFREE_ASSIGN_OR_RETURN(engine_, call_.env().models->Find(request_->model()));
    MMFREE_RETURN_IF_ERROR(
        ValidateCreateSession(*request_, engine_->model().config(), call_.env().limits));
    MMFREE_ASSIGN_OR_RETURN(name_, NewName(call_.caller(), request_->session_id(), "session_id"));
    MMFREE_ASSIGN_OR_RETURN(ttl_, TtlOf(request_->has_ttl(), request_->ttl()));
    // A prompt is not run for a name that is taken; Create has the last word.
    if (!name_.id.empty() && sessions_->Get(name_).ok()) {
      return absl::AlreadyExistsError(absl::StrCat("session ", Quoted(name_.id), " exists"));
    }
    MMFREE_ASSIGN_OR_RETURN(prompt_, SystemPrompt());
    if (prompt_.empty()) {
      Create(SessionState());
      return absl::OkStatus();
    }
    MMFREE_RETURN_IF_ERROR(CheckPromptAdmissible(*engine_,
                                                 request_->has_text() ? "text" : "token_ids",
                                                 static_cast<int64_t>(prompt_.size())));
    GenerationRequest request;
    request.request_id = RequestIdOr("");
    request.prompt = prompt_;
    request.final_state = final_state_;
    request.final_on_device = true;
    request.caller = call_.caller();
    request.cache_salt = request_->cache_salt();
    request.deadline = call_.deadline();
    const auto prefill = std::make_shared<Prefill>(this, engine_);
    {
      absl::MutexLock lock(&mu_);
      if (cancelled_) return call_.CancelStatus();
      prefill_ = prefill;
    }
    const absl::Status submitted = Prefill::Submit(prefill, std::move(request));
    // Once it is submitted this object may be gone.
    return submitted.ok() ? submitted : WithEngineRetryDelay(submitted, *engine_);
  }

  absl::StatusOr<std::vector<int32_t>> SystemPrompt() const {
    switch (request_->system_prompt_case()) {
      case v1::CreateSessionRequest::kText:
        return EncodeInput(engine_->tokenizer(), request_->text(), "text",
                           call_.env().limits.max_prompt_tokens);
      case v1::CreateSessionRequest::kTokenIds:
        return std::vector<int32_t>(request_->token_ids().ids().begin(),
                                    request_->token_ids().ids().end());
      case v1::CreateSessionRequest::SYSTEM_PROMPT_NOT_SET:
        break;
    }
    return std::vector<int32_t>();
  }

  // From a delivery thread.
  void OnPromptDone(const absl::Status& status) {
    if (!status.ok()) {
      Finish(call_.Finish(WithEngineRetryDelay(status, *engine_)));
    } else if (!call_.env().session_threads->Schedule([this] { CreateAfterPrompt(); })) {
      Finish(call_.Finish(SessionThreadsBusy()));
    }
  }

  // On a session thread.
  void CreateAfterPrompt() {
    const absl::StatusOr<SessionState> state =
        NextState(SessionState(), prompt_, final_state_.get());
    if (!state.ok()) {
      Finish(call_.Finish(state.status()));
      return;
    }
    Create(*state);
  }

  // On a session thread.
  void Create(const SessionState& state) {
    const absl::StatusOr<SessionInfo> info =
        sessions_->Create(name_, engine_->model_name(), engine_->model().digest(), state, ttl_);
    if (info.ok()) ToProto(*info, response_->mutable_session());
    Finish(call_.Finish(WithStoreRetryDelay(info.status())));
  }

  Call call_;
  const v1::CreateSessionRequest* const request_;
  v1::CreateSessionResponse* const response_;
  const std::shared_ptr<FinalState> final_state_ = std::make_shared<FinalState>();
  SessionTable* sessions_ = nullptr;
  Engine* engine_ = nullptr;
  SessionName name_;
  std::optional<absl::Duration> ttl_;
  std::vector<int32_t> prompt_;

  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<Prefill> prefill_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

grpc::ServerUnaryReactor* HandleCreateSession(const RpcEnvironment* env,
                                              grpc::CallbackServerContext* context,
                                              const v1::CreateSessionRequest* request,
                                              v1::CreateSessionResponse* response) {
  auto* const reactor = new CreateSessionReactor(env, *context, request, response);
  reactor->Start();
  return reactor;
}

}  // namespace mmfree
