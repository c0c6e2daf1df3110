#include "server/engine/engine.h"

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

absl::Status CheckAtLeast(int64_t value, int64_t least, absl::string_view option) {
  if (value >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is ", value, "; it must be at least ", least));
}

// What each token adds to a text, by id; nothing beyond the tokenizer's own.
Vocabulary VocabularyOf(const Tokenizer& tokenizer, int64_t vocab_size) {
  std::vector<std::string> running;
  for (int64_t id = 0; id < vocab_size; ++id) {
    const absl::string_view bytes = tokenizer.TokenBytes(static_cast<int32_t>(id));
    running.emplace_back(bytes.data(), bytes.size());
  }
  const auto trie = std::make_shared<const TokenTrie>(running);
  if (!tokenizer.adds_dummy_prefix()) return {trie, trie};
  std::vector<std::string> first;
  for (int64_t id = 0; id < vocab_size; ++id) {
    first.emplace_back(BytesAtStart(tokenizer, static_cast<int32_t>(id)));
  }
  return {trie, std::make_shared<const TokenTrie>(std::move(first))};
}

// Null when the backend keeps no states at rest. `backend` outlives the use of the pool's places.
std::shared_ptr<DevicePool> MakeDevicePool(Backend* backend, SessionMetrics* metrics) {
  const BackendInfo& info = backend->info();
  if (info.resident_slots == 0) return nullptr;
  DevicePool::Options options;
  options.first_slot = info.num_slots;
  options.num_slots = info.resident_slots;
  options.state_floats = info.state_floats;
  options.read = [backend](int32_t slot, absl::Span<float> state) {
    return backend->ReadResident(slot, state);
  };
  return std::make_shared<DevicePool>(std::move(options), metrics);
}

class EngineImpl final : public Engine {
 public:
  EngineImpl(Options options, std::shared_ptr<const Model> model,
             std::shared_ptr<const Tokenizer> tokenizer, std::unique_ptr<Backend> backend,
             ModelMetrics* metrics)
      : options_(std::move(options)),
        model_(std::move(model)),
        tokenizer_(std::move(tokenizer)),
        device_pool_(MakeDevicePool(backend.get(), options_.session_metrics)),
        loop_(LoopOptions(), std::move(backend), metrics) {}
  ~EngineImpl() override {
    if (device_pool_ != nullptr) device_pool_->Close();
  }

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override {
    return loop_.Submit(std::move(request), std::move(sink));
  }
  absl::StatusOr<RequestHandle> Score(ScoreRequest request,
                                      std::shared_ptr<ScoreSink> sink) override {
    return loop_.Submit(std::move(request), std::move(sink));
  }
  int64_t CachedTokens(const GenerationRequest& request) const override {
    return loop_.CachedTokens(request);
  }
  void Cancel(RequestHandle handle) override { loop_.Cancel(handle); }

  void Drain(absl::Time deadline) override {
    BecomeUnhealthy();
    loop_.Drain(deadline);
  }

  bool healthy() const override { return healthy_.load(); }

  Load load() const override {
    const StepLoop::Load loop = loop_.load();
    Load load;
    load.queued = static_cast<int32_t>(loop.waiting);
    load.running = static_cast<int32_t>(loop.running);
    load.queued_tokens = loop.waiting_tokens;
    load.slots_used = load.running;
    load.slots_total = backend_info().num_slots;
    load.paused = static_cast<int32_t>(loop.paused);
    load.preempted = static_cast<int32_t>(loop.preempted);
    load.tokens_in_flight = loop.tokens_in_flight;
    load.step_time = loop.step_time;
    load.estimated_wait = loop.estimated_wait[static_cast<size_t>(Priority::kNormal)];
    return load;
  }

  Limits limits() const override {
    return {.requests = int64_t{loop_.capacity()} + options_.max_queue,
            .queue_tokens = options_.max_queue_tokens,
            .prompt_tokens = options_.max_queue_tokens};
  }

  std::vector<std::shared_ptr<DevicePool>> device_pools() const override {
    if (device_pool_ == nullptr) return {};
    return {device_pool_};
  }

  const std::string& model_name() const override { return options_.model_name; }
  const Model& model() const override { return *model_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const BackendInfo& backend_info() const override { return loop_.backend_info(); }
  ConstraintCache* constraints() const override { return &constraints_; }

 private:
  StepLoop::Options LoopOptions() {
    StepLoop::Options loop;
    loop.policy.max_batch = options_.max_batch;
    loop.policy.prefill_chunk = options_.prefill_chunk;
    loop.policy.step_token_budget = options_.step_token_budget;
    loop.max_queue = options_.max_queue;
    loop.max_queue_tokens = options_.max_queue_tokens;
    loop.max_stream_backlog = options_.max_stream_backlog;
    loop.stalled_reader_timeout = options_.stalled_reader_timeout;
    loop.step_time_target = options_.step_time_target;
    loop.delivery_threads = options_.delivery_threads;
    loop.vocab_size = model_->config().vocab_size;
    loop.prefixes.cache = options_.prefix_cache;
    loop.prefixes.model_digest = model_->digest();
    loop.prefixes.interval = options_.prefix_cache_interval;
    loop.device_pool = device_pool_.get();
    loop.clock = options_.clock;
    loop.fault_listener = [this] { BecomeUnhealthy(); };
    return loop;
  }

  void BecomeUnhealthy() {
    if (healthy_.exchange(false) && options_.health_listener) options_.health_listener(false);
  }

  const Options options_;
  const std::shared_ptr<const Model> model_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  mutable ConstraintCache constraints_{
      [this] { return VocabularyOf(*tokenizer_, model_->config().vocab_size); }};
  std::atomic<bool> healthy_{true};
  const std::shared_ptr<DevicePool> device_pool_;
  StepLoop loop_;  // last: its threads use what is above
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(Options options,
                                                       std::shared_ptr<const Model> model,
                                                       std::shared_ptr<const Tokenizer> tokenizer,
                                                       std::unique_ptr<Backend> backend,
                                                       Metrics* metrics) {
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.max_batch, 0, "max_batch"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.max_queue, 0, "max_queue"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.max_queue_tokens, 1, "max_queue_tokens"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.prefill_chunk, 1, "prefill_chunk"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.step_token_budget, 1, "step_token_budget"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.delivery_threads, 1, "delivery_threads"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(options.prefix_cache_interval, 0, "prefix_cache_interval"));
  const BackendInfo& info = backend->info();
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(info.num_slots, 1, "the backend's num_slots"));
  MMFREE_RETURN_IF_ERROR(CheckAtLeast(info.max_step_tokens, 1, "the backend's max_step_tokens"));
  ModelMetrics* const instruments = metrics->ForModel(
      {options.model_name, model->digest(), info.name, info.description, options.replica});
  return std::make_unique<EngineImpl>(std::move(options), std::move(model), std::move(tokenizer),
                                      std::move(backend), instruments);
}

}  // namespace mmfree
