#include "tests/bench/engine_bench.h"

#include <prometheus/registry.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/base/status_macros.h"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"
#include "server/model/model.h"
#include "server/scheduler/request.h"
#include "server/tokenizer/tokenizer.h"
#include "tests/bench/bench_backend.h"
#include "tests/bench/report.h"

namespace mmfree {
namespace {

constexpr int32_t kPromptTokens = 32;

// What has come of all requests. Thread-safe.
class Progress {
 public:
  void AddTokens(size_t tokens) {
    const absl::MutexLock lock(&mutex_);
    tokens_ += static_cast<int64_t>(tokens);
  }
  void End(const absl::Status& status) {
    const absl::MutexLock lock(&mutex_);
    ++ended_;
    status_.Update(status);
  }
  // Blocks until so many requests have ended; how many have, or the first error.
  absl::StatusOr<int64_t> WaitForEnds(int64_t ends) {
    const absl::MutexLock lock(&mutex_);
    const auto enough = [this, ends] {
      mutex_.AssertReaderHeld();
      return ended_ >= ends;
    };
    mutex_.Await(absl::Condition(&enough));
    MMFREE_RETURN_IF_ERROR(status_);
    return ended_;
  }
  int64_t tokens() const {
    const absl::MutexLock lock(&mutex_);
    return tokens_;
  }

 private:
  mutable absl::Mutex mutex_;
  int64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

class CountingSink final : public GenerationSink {
 public:
  explicit CountingSink(Progress* progress) : progress_(progress) {}
  void OnTokens(absl::Span<const SampledToken> tokens) override {
    progress_->AddTokens(tokens.size());
  }
  void OnFinished(const absl::StatusOr<GenerationResult>& result) override {
    progress_->End(result.status());
  }
  size_t backlog() const override { return 0; }

 private:
  Progress* const progress_;
};

GenerationRequest MakeRequest(const BenchOptions& options, int64_t index, int32_t vocab) {
  GenerationRequest request;
  const int32_t tokens = options.tokens > 0 ? options.tokens : kPromptTokens;
  for (int32_t t = 0; t < tokens; ++t) {
    request.prompt.push_back(
        static_cast<int32_t>((int64_t{7919} * (index * tokens + t) + 1) % vocab));
  }
  request.sampling.temperature = 0.0f;
  request.max_new_tokens = options.max_tokens;
  return request;
}

}  // namespace

absl::Status BenchEngine(const BenchOptions& options) {
  if (options.model.empty()) {
    return absl::InvalidArgumentError("engine: name the model directory with --model=DIR");
  }
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, Model::Load(options.model));
  const int32_t vocab = static_cast<int32_t>(model->config().vocab_size);
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Tokenizer> tokenizer,
                          Tokenizer::Load(options.model, vocab));
  MMFREE_ASSIGN_OR_RETURN(
      std::unique_ptr<Backend> backend,
      MakeBenchBackend(options, model, options.batch, options.step_token_budget));
  const int64_t requests = options.requests > 0 ? options.requests : int64_t{4} * options.batch;

  Progress progress;
  prometheus::Registry registry;
  const std::unique_ptr<Metrics> metrics = Metrics::Create(&registry);
  Engine::Options engine_options;
  engine_options.model_name = "bench";
  engine_options.max_queue = options.batch;
  engine_options.step_token_budget = options.step_token_budget;
  MMFREE_ASSIGN_OR_RETURN(
      const std::unique_ptr<Engine> engine,
      Engine::Create(engine_options, model, tokenizer, std::move(backend), metrics.get()));

  EngineReport report;
  report.requests = requests;
  int64_t submitted = 0;
  int64_t ended = 0;
  const auto start = std::chrono::steady_clock::now();
  while (ended < requests) {
    for (; submitted < std::min(requests, ended + options.batch); ++submitted) {
      MMFREE_RETURN_IF_ERROR(engine
                                 ->Submit(MakeRequest(options, submitted, vocab),
                                          std::make_shared<CountingSink>(&progress))
                                 .status());
    }
    MMFREE_ASSIGN_OR_RETURN(ended, progress.WaitForEnds(ended + 1));
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  report.tokens = progress.tokens();
  PrintEngineReport(options, engine->backend_info(), report);
  return absl::OkStatus();
}

}  // namespace mmfree
