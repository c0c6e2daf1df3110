// An engine that does nothing by itself: the test plays the scheduler.
#ifndef MMFREE_TESTS_UNIT_RPC_FAKE_ENGINE_H_
#define MMFREE_TESTS_UNIT_RPC_FAKE_ENGINE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/engine/engine.h"
#include "tests/support/fake_model.h"

namespace mmfree {

// Thread-safe. Keeps every request and its sink until the test ends it; a cancelled or drained one
// is ended by the engine, as the real one does.
class FakeEngine final : public Engine {
 public:
  static constexpr int64_t kVocabSize = 259;  // FakeTokenizer's

  explicit FakeEngine(std::string name = "fake") : name_(std::move(name)), model_(kVocabSize) {
    info_.name = "cpu";
    info_.description = "fake";
    info_.num_slots = 4;
    info_.state_floats = 8;
  }

  struct Submission {
    RequestHandle handle = 0;
    GenerationRequest generation;
    std::shared_ptr<GenerationSink> sink;  // null for a score
    ScoreRequest score;
    std::shared_ptr<ScoreSink> score_sink;
  };

  // Engine.
  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override {
    Submission submission;
    submission.generation = std::move(request);
    submission.sink = std::move(sink);
    return Add(std::move(submission));
  }
  absl::StatusOr<RequestHandle> Score(ScoreRequest request,
                                      std::shared_ptr<ScoreSink> sink) override {
    Submission submission;
    submission.score = std::move(request);
    submission.score_sink = std::move(sink);
    return Add(std::move(submission));
  }
  void Cancel(RequestHandle handle) override {
    {
      absl::MutexLock lock(&mu_);
      ++cancels_;
    }
    End(handle, absl::CancelledError("cancelled"));
  }
  void Drain(absl::Time) override {
    std::vector<RequestHandle> left;
    {
      absl::MutexLock lock(&mu_);
      healthy_ = false;
      refusal_ = absl::UnavailableError("draining");
      for (const auto& [handle, submission] : running_) left.push_back(handle);
    }
    for (const RequestHandle handle : left) End(handle, absl::UnavailableError("draining"));
  }
  bool healthy() const override {
    absl::MutexLock lock(&mu_);
    return healthy_;
  }
  Load load() const override {
    Load load;
    absl::MutexLock lock(&mu_);
    load.running = load.slots_used = static_cast<int32_t>(running_.size());
    load.slots_total = info_.num_slots;
    load.queued = 3;
    load.queued_tokens = 30;
    load.estimated_wait = absl::Milliseconds(1500);
    return load;
  }
  Limits limits() const override { return limits_; }
  const std::string& model_name() const override { return name_; }
  const Model& model() const override { return model_; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  const BackendInfo& backend_info() const override { return info_; }
  ConstraintCache* constraints() const override { return &constraints_; }

  // The test's side.

  // Before any request.
  void SetLimits(Limits limits) { limits_ = limits; }
  // What Submit and Score give instead of a handle, from now on.
  void Refuse(absl::Status status) {
    absl::MutexLock lock(&mu_);
    refusal_ = std::move(status);
  }
  void SetHealthy(bool healthy) {
    absl::MutexLock lock(&mu_);
    healthy_ = healthy;
  }
  // The request number `index` in order of submission; waits for it.
  Submission WaitFor(size_t index) {
    absl::MutexLock lock(&mu_);
    const auto arrived = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return all_.size() > index; };
    mu_.Await(absl::Condition(&arrived));
    return all_[index];
  }
  void WaitUntilIdle() {
    absl::MutexLock lock(&mu_);
    const auto idle = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return running_.empty(); };
    mu_.Await(absl::Condition(&idle));
  }
  int cancels() const {
    absl::MutexLock lock(&mu_);
    return cancels_;
  }
  // Ends a request unless it has ended.
  void End(RequestHandle handle, const absl::StatusOr<GenerationResult>& result) {
    std::optional<Submission> submission = Take(handle);
    if (!submission.has_value()) return;
    if (submission->sink != nullptr) submission->sink->OnFinished(result);
    if (submission->score_sink != nullptr) submission->score_sink->OnScored(result.status());
  }
  void EndScore(RequestHandle handle, ScoreResult result) {
    std::optional<Submission> submission = Take(handle);
    if (submission.has_value()) submission->score_sink->OnScored(std::move(result));
  }

 private:
  absl::StatusOr<RequestHandle> Add(Submission submission) {
    absl::MutexLock lock(&mu_);
    if (!refusal_.ok()) return refusal_;
    submission.handle = ++last_handle_;
    running_[submission.handle] = submission;
    all_.push_back(std::move(submission));
    return last_handle_;
  }
  std::optional<Submission> Take(RequestHandle handle) {
    absl::MutexLock lock(&mu_);
    const auto found = running_.find(handle);
    if (found == running_.end()) return std::nullopt;
    Submission submission = std::move(found->second);
    running_.erase(found);
    return submission;
  }

  const std::string name_;
  const FakeModel model_;
  const FakeTokenizer tokenizer_;
  mutable ConstraintCache constraints_{[] {
    std::vector<std::string> bytes;
    for (int32_t id = 0; id < kVocabSize; ++id) bytes.emplace_back(FakeTokenizer().TokenBytes(id));
    const auto trie = std::make_shared<const TokenTrie>(bytes);
    return Vocabulary{trie, trie};
  }};
  BackendInfo info_;
  Limits limits_ = {.requests = 1000, .queue_tokens = 1'000'000, .prompt_tokens = 1'000'000};
  mutable absl::Mutex mu_;
  absl::Status refusal_ ABSL_GUARDED_BY(mu_);
  bool healthy_ ABSL_GUARDED_BY(mu_) = true;
  int cancels_ ABSL_GUARDED_BY(mu_) = 0;
  RequestHandle last_handle_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<RequestHandle, Submission> running_ ABSL_GUARDED_BY(mu_);
  std::vector<Submission> all_ ABSL_GUARDED_BY(mu_);
};

// Tokens of FakeTokenizer for some bytes, with logprobs -1, -2, ...
inline std::vector<SampledToken> Tokens(absl::string_view bytes) {
  std::vector<SampledToken> tokens;
  for (const char byte : bytes) {
    tokens.push_back(
        {3 + static_cast<unsigned char>(byte), -static_cast<float>(tokens.size() + 1)});
  }
  return tokens;
}

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_RPC_FAKE_ENGINE_H_
