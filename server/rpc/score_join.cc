#include "server/rpc/score_join.h"

#include <utility>

#include "server/rpc/conversion.h"

namespace mmfree {

class ScoreJoin::Sink final : public ScoreSink {
 public:
  Sink(std::shared_ptr<ScoreJoin> join, size_t index) : join_(std::move(join)), index_(index) {}
  void OnScored(absl::StatusOr<ScoreResult> result) override {
    join_->OnScored(index_, std::move(result));
  }

 private:
  const std::shared_ptr<ScoreJoin> join_;
  const size_t index_;
};

ScoreJoin::ScoreJoin(Engine* engine, v1::ScoreResponse* response,
                     std::function<void(absl::Status)> done)
    : engine_(engine), response_(response), done_(std::move(done)) {}

void ScoreJoin::Start(std::vector<ScoreRequest> requests) {
  for (const ScoreRequest& request : requests) {
    v1::ScoreResult* result = response_->add_results();
    result->mutable_token_ids()->Add(request.tokens.begin(), request.tokens.end());
  }
  absl::Status status;
  for (size_t i = 0; i < requests.size(); ++i) {
    {
      absl::MutexLock lock(&mu_);
      if (!status_.ok()) break;
      ++outstanding_;
    }
    absl::StatusOr<RequestHandle> handle =
        engine_->Score(std::move(requests[i]), std::make_shared<Sink>(shared_from_this(), i));
    if (!handle.ok()) {
      Release(WithEngineRetryDelay(handle.status(), *engine_));
      break;
    }
    bool failed;
    {
      absl::MutexLock lock(&mu_);
      handles_.push_back(*handle);
      failed = !status_.ok();
    }
    if (failed) engine_->Cancel(*handle);
  }
  Release(absl::OkStatus());
}

void ScoreJoin::Cancel(const absl::Status& status) {
  std::vector<RequestHandle> handles;
  {
    absl::MutexLock lock(&mu_);
    if (!status_.ok()) return;
    status_ = status;
    handles = handles_;
  }
  for (const RequestHandle handle : handles) engine_->Cancel(handle);
}

void ScoreJoin::OnScored(size_t index, absl::StatusOr<ScoreResult> result) {
  if (result.ok()) {
    v1::ScoreResult* out = response_->mutable_results(static_cast<int>(index));
    out->mutable_logprobs()->Add(result->logprobs.begin(), result->logprobs.end());
    out->mutable_argmax()->Add(result->argmax.begin(), result->argmax.end());
    out->mutable_last_logits()->Add(result->last_logits.begin(), result->last_logits.end());
    ToProto(result->timings, out->mutable_timings());
  }
  Release(WithEngineRetryDelay(result.status(), *engine_));
}

void ScoreJoin::Release(const absl::Status& status) {
  // Cancel may reach back into OnScored of others, but never ends the call: this one is still
  // outstanding.
  if (!status.ok()) Cancel(status);
  absl::Status final_status;
  {
    absl::MutexLock lock(&mu_);
    if (--outstanding_ > 0) return;
    final_status = status_;
  }
  done_(final_status);
}

}  // namespace mmfree
