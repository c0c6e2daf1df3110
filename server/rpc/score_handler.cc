#include "server/rpc/score_handler.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/rpc/admissible.h"
#include "server/rpc/call.h"
#include "server/rpc/conversion.h"
#include "server/rpc/score_join.h"
#include "server/rpc/validation.h"

namespace mmfree {
namespace {

// Owns itself: gRPC calls OnDone last.
class ScoreReactor final : public grpc::ServerUnaryReactor {
 public:
  ScoreReactor(const RpcEnvironment* env, const grpc::CallbackServerContext& context,
               const v1::ScoreRequest* request, v1::ScoreResponse* response)
      : call_(env, "Score", context), request_(request), response_(response) {}

  void Start() {
    absl::Status status = call_.admission();
    absl::StatusOr<Engine*> engine = call_.env().models->Find(request_->model());
    if (status.ok()) status = engine.status();
    if (status.ok()) {
      status = ValidateScore(*request_, (*engine)->model().config(), call_.env().limits);
    }
    if (status.ok()) {
      size_t text_bytes = 0;
      for (const v1::ScoreInput& input : request_->inputs()) text_bytes += input.text().size();
      status = call_.Run(text_bytes, [this, engine = *engine] { Submit(engine); });
      if (status.ok()) return;
    }
    Finish(call_.Finish(status));
  }

  void OnCancel() override {
    std::shared_ptr<ScoreJoin> join;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      join = join_;
    }
    // When its deadline passes the engine ends a request on its own, with the right status.
    if (join != nullptr && !call_.deadline_passed()) join->Cancel(call_.CancelStatus());
  }

  void OnDone() override { delete this; }

 private:
  void Submit(Engine* engine) {
    std::vector<ScoreRequest> requests;
    for (int i = 0; i < request_->inputs_size(); ++i) {
      absl::StatusOr<ScoreRequest> request =
          ToScoreRequest(*request_, i, *engine, call_.env().limits);
      if (!request.ok()) {
        Finish(call_.Finish(request.status()));
        return;
      }
      request->deadline = call_.deadline();
      request->caller = call_.caller();
      requests.push_back(*std::move(request));
    }
    if (const absl::Status status = CheckPromptsAdmissible(*engine, "inputs", requests);
        !status.ok()) {
      Finish(call_.Finish(status));
      return;
    }
    const auto join =
        std::make_shared<ScoreJoin>(engine, response_, [this](const absl::Status& status) {
          if (!status.ok()) response_->Clear();
          Finish(call_.Finish(status));
        });
    bool cancelled;
    {
      absl::MutexLock lock(&mu_);
      cancelled = cancelled_;
      if (!cancelled) join_ = join;
    }
    if (cancelled) {
      Finish(call_.Finish(call_.CancelStatus()));
    } else {
      join->Start(std::move(requests));
    }
  }

  Call call_;
  const v1::ScoreRequest* const request_;
  v1::ScoreResponse* const response_;
  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<ScoreJoin> join_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

grpc::ServerUnaryReactor* HandleScore(const RpcEnvironment* env,
                                      grpc::CallbackServerContext* context,
                                      const v1::ScoreRequest* request,
                                      v1::ScoreResponse* response) {
  auto* const reactor = new ScoreReactor(env, *context, request, response);
  reactor->Start();
  return reactor;
}

}  // namespace mmfree
