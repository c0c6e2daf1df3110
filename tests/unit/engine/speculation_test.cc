// Speculation over the CPU backend: it changes no byte of any output, and is used.
#include <prometheus/registry.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/engine/engine.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/fake_model.h"
#include "tests/support/metric_reader.h"

namespace mmfree {
namespace {

constexpr int32_t kVocab = 259;  // FakeTokenizer's

// Ends after the second of two tokens in succession.
class PairStop final : public StopCondition {
 public:
  PairStop(int32_t first, int32_t second) : first_(first), second_(second) {}
  bool Append(int32_t token) override {
    return std::exchange(last_, token) == first_ && token == second_;
  }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<PairStop>(*this);
  }

 private:
  int32_t first_;
  int32_t second_;
  int32_t last_ = -1;
};

// All that a request gives.
struct Outcome {
  absl::StatusOr<GenerationResult> result = absl::UnknownError("not run");
  std::vector<SampledToken> tokens;
  std::shared_ptr<FinalState> state;
};

void ExpectSame(const Outcome& expected, const Outcome& actual) {
  ASSERT_EQ(expected.result.status(), actual.result.status());
  ASSERT_EQ(expected.tokens.size(), actual.tokens.size());
  for (size_t i = 0; i < expected.tokens.size(); ++i) {
    const SampledToken& e = expected.tokens[i];
    const SampledToken& a = actual.tokens[i];
    ASSERT_EQ(e.token, a.token) << "token " << i;
    ASSERT_EQ(e.logprob, a.logprob) << "token " << i;
    ASSERT_EQ(e.top == nullptr, a.top == nullptr);
    if (e.top == nullptr) continue;
    ASSERT_EQ(e.top->size(), a.top->size());
    for (size_t k = 0; k < e.top->size(); ++k) {
      ASSERT_EQ((*e.top)[k].token, (*a.top)[k].token);
      ASSERT_EQ((*e.top)[k].logprob, (*a.top)[k].logprob);
    }
  }
  if (!expected.result.ok()) return;
  EXPECT_EQ(expected.result->reason, actual.result->reason);
  EXPECT_EQ(expected.result->matched_stop_token, actual.result->matched_stop_token);
  EXPECT_EQ(expected.result->usage.completion_tokens, actual.result->usage.completion_tokens);
  EXPECT_EQ(expected.state->state, actual.state->state) << "other bytes in the state";
  EXPECT_EQ(expected.state->fed, actual.state->fed);
  EXPECT_EQ(expected.state->pending, actual.state->pending);
  EXPECT_EQ(expected.state->emitted, actual.state->emitted);
}

class SpeculationTest : public ::testing::Test {
 protected:
  SpeculationTest() {
    ModelConfig config;
    config.vocab_size = kVocab;
    config.hidden_size = 48;
    config.intermediate_size = 96;
    config.num_layers = 2;
    model_ = Model::Random(config, 5);
  }

  void StartEngine(int32_t slots, int32_t budget, size_t max_stream_backlog = 8) {
    engine_.reset();
    CpuBackendOptions backend_options;
    backend_options.threads = 2;
    backend_options.num_slots = slots;
    auto backend = CreateCpuBackend(model_, backend_options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    Engine::Options options;
    options.model_name = "random";
    options.prefill_chunk = 16;
    options.step_token_budget = budget;
    options.max_stream_backlog = max_stream_backlog;
    registry_ = std::make_unique<prometheus::Registry>();
    metrics_ = Metrics::Create(registry_.get());
    auto engine = Engine::Create(options, model_, std::make_shared<FakeTokenizer>(),
                                 *std::move(backend), metrics_.get());
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  // The request number `i`, with everything that may meet speculation; its own sampler each time.
  GenerationRequest Request(int i) const {
    std::mt19937 random(i);
    const auto percent = [&random](uint32_t p) { return random() % 100 < p; };
    GenerationRequest request;
    const int words = 1 + static_cast<int>(random() % 6);
    std::vector<int32_t> word(1 + random() % 5);
    for (int32_t& token : word) token = static_cast<int32_t>(random() % kVocab);
    for (int w = 0; w < words; ++w) {
      request.prompt.insert(request.prompt.end(), word.begin(), word.end());
    }
    request.max_new_tokens = 1 + random() % 60;
    if (percent(50)) {
      request.sampling.temperature = 0.02f + 0.02f * static_cast<float>(random() % 10);
      request.sampling.seed = random();
      request.sampling.candidate = random() % 3;
    }
    if (percent(70)) request.eos_token_ids = {static_cast<int32_t>(random() % kVocab)};
    if (percent(30)) request.stop_token_ids = {static_cast<int32_t>(random() % kVocab)};
    if (percent(30)) request.min_new_tokens = random() % (request.max_new_tokens + 1);
    if (percent(20)) {
      request.stop_condition =
          std::make_shared<PairStop>(word.front(), word[word.size() > 1 ? 1 : 0]);
    }
    RequestSampler::Options options;
    if (percent(30)) options.penalties.repetition = 1.02f;
    if (percent(20)) options.penalties.frequency = 0.01f;
    if (percent(20)) options.filters.top_k = 3;
    if (percent(20)) options.filters.top_p = 0.9f;
    if (percent(20)) options.bias = {{word.front(), 0.5f}};
    if (percent(20)) options.banned = {word.back()};
    if (percent(20)) options.top_logprobs = 3;
    if (percent(20)) options.logprobs = RequestSampler::Logprobs::kSampling;
    if (percent(20)) {
      options.constraint =
          *engine_->constraints()->Compile(ConstraintCache::Kind::kRegex, "(ab+|[a-f]{2})*z?");
      options.end_tokens = request.eos_token_ids;
      options.end_tokens.insert(options.end_tokens.end(), request.stop_token_ids.begin(),
                                request.stop_token_ids.end());
    }
    if (!options.plain()) {
      request.sampler = std::make_shared<RequestSampler>(options, kVocab, request.prompt);
    }
    request.priority = static_cast<Priority>(random() % 3);
    request.final_state = std::make_shared<FinalState>();
    return request;
  }

  std::shared_ptr<CollectingSink> Submit(const GenerationRequest& request) {
    auto sink = std::make_shared<CollectingSink>(request.prompt.size() % 3 == 0
                                                     ? CollectingSink::Reader::kIdle
                                                     : CollectingSink::Reader::kEager);
    EXPECT_TRUE(engine_->Submit(request, sink).ok());
    return sink;
  }

  double Metric(const std::string& name) const { return MetricValue(*registry_, name); }

  std::shared_ptr<const Model> model_;
  std::unique_ptr<prometheus::Registry> registry_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(SpeculationTest, NoByteOfAnyRequestChanges) {
  constexpr int kRequests = 150;
  StartEngine(1, 1024);
  std::vector<Outcome> expected;
  for (int i = 0; i < kRequests; ++i) {
    const GenerationRequest request = Request(i);
    auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine_->Submit(request, sink).ok());
    Outcome outcome;
    outcome.result = sink->WaitForEnd();
    outcome.tokens = sink->tokens();
    outcome.state = request.final_state;
    expected.push_back(outcome);
  }
  EXPECT_EQ(Metric("mmfree_speculative_rows_total"), 0);

  // Few slots: higher priorities preempt; a small budget: rows get less than they would propose.
  for (const int32_t slots : {3, 12}) {
    StartEngine(slots, slots == 3 ? 20 : 1024);
    std::vector<GenerationRequest> requests;
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < kRequests; ++i) {
      requests.push_back(Request(i));
      requests.back().speculative_tokens = 1 + i % 16;
      sinks.push_back(Submit(requests.back()));
    }
    for (const auto& sink : sinks) sink->StartReading();
    for (int i = 0; i < kRequests; ++i) {
      SCOPED_TRACE(i);
      Outcome outcome;
      outcome.result = sinks[i]->WaitForEnd();
      outcome.tokens = sinks[i]->tokens();
      outcome.state = requests[i].final_state;
      ExpectSame(expected[i], outcome);
      if (HasFatalFailure()) return;
    }
    const double accepted = Metric("mmfree_speculative_accepted_tokens_total");
    // How many depends on which rows were paused in the middle of a run.
    EXPECT_GT(accepted, 0);
    EXPECT_LT(accepted, Metric("mmfree_speculative_proposed_tokens_total"));
  }
}

TEST_F(SpeculationTest, ALoopIsFollowedManyTokensAStep) {
  StartEngine(1, 1024, 1000);
  GenerationRequest request;
  request.prompt = {5, 6, 7, 8, 5, 6, 7, 8, 5, 6};
  request.max_new_tokens = 400;
  RequestSampler::Options options;
  options.allowed = {9};  // the output is 9 9 9 ...
  options.logprobs = RequestSampler::Logprobs::kNone;
  request.sampler = std::make_shared<RequestSampler>(options, kVocab, request.prompt);
  request.speculative_tokens = 16;
  auto sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(request, sink).ok());
  ASSERT_TRUE(sink->WaitForEnd().ok());
  EXPECT_THAT(sink->ids(), testing::AllOf(testing::SizeIs(400), testing::Each(9)));
  // 17 tokens a step, but for the beginning.
  const double steps = Metric("mmfree_step_tokens");
  EXPECT_GT(steps, 400 / 17);
  EXPECT_LE(steps, 40);
}

TEST_F(SpeculationTest, WhatIsProposedComesFromTheContextBeforeThePromptToo) {
  StartEngine(1, 1024);
  GenerationRequest request;
  request.prompt = {9};
  request.lookup_context = {20, 9, 9, 9, 9};
  request.max_new_tokens = 2;
  RequestSampler::Options options;
  options.allowed = {9};
  request.sampler = std::make_shared<RequestSampler>(options, kVocab, request.prompt);
  request.speculative_tokens = 4;
  auto sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(request, sink).ok());
  ASSERT_TRUE(sink->WaitForEnd().ok());
  // The last token of all is not fed, so two tokens leave nothing to propose; three do.
  EXPECT_EQ(Metric("mmfree_speculative_rows_total"), 0);
  request.max_new_tokens = 3;
  request.sampler = std::make_shared<RequestSampler>(options, kVocab, request.prompt);
  sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(request, sink).ok());
  ASSERT_TRUE(sink->WaitForEnd().ok());
  EXPECT_EQ(Metric("mmfree_speculative_accepted_tokens_total"), 1);
}

}  // namespace
}  // namespace mmfree
