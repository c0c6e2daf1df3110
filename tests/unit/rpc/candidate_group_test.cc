#include "server/rpc/candidate_group.h"

#include <prometheus/registry.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/rpc/best_of.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/metric_reader.h"
#include "tests/support/status_is.h"
#include "tests/unit/rpc/fake_engine.h"
#include "tests/unit/rpc/fake_writer.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kRetryInfo[] = "type.googleapis.com/google.rpc.RetryInfo";

// The engine and the transport are the test's.
class CandidateGroupTest : public testing::Test {
 protected:
  void Start(uint32_t candidates, GenerationStream::Options options = {}) {
    options.request_id = "r1";
    GenerationRequest request;
    request.prompt = {1, 3 + 'H', 3 + 'i'};
    request.max_new_tokens = 9;
    request.min_new_tokens = 1;
    request.eos_token_ids = {2};
    request.first_position = 10;
    request.prompt_logprobs = options.prompt_logprobs;
    request.prompt_top_logprobs = options.prompt_logprobs ? 4 : 0;
    group_ = std::make_shared<CandidateGroup>(candidates, options, &engine_, request, &writer_);
    group_->Start();
  }
  // The prompt was fed.
  void EndPrompt() {
    const FakeEngine::Submission prompt = engine_.WaitFor(0);
    FinalState& state = *prompt.generation.final_state;
    state.state = {1.0f, 2.0f};
    state.fed = 2;
    state.pending = {3 + 'i'};
    GenerationResult result;
    result.usage = {3, 1, 0};
    result.timings = {absl::Seconds(1), absl::Seconds(2), absl::ZeroDuration()};
    engine_.End(prompt.handle, result);
    writer_.CompleteAll(group_.get());
  }
  FakeEngine::Submission Candidate(int number) { return engine_.WaitFor(number + 1); }
  static GenerationResult Result() {
    GenerationResult result;
    result.usage = {1, 0, 5};
    result.timings = {absl::Seconds(10), absl::Seconds(20), absl::Seconds(30)};
    return result;
  }

  FakeEngine engine_;
  FakeWriter writer_;
  std::shared_ptr<CandidateGroup> group_;
};

TEST_F(CandidateGroupTest, ThePromptIsFedOnceAndEachCandidateGoesOnFromItsState) {
  Start(3);
  const GenerationRequest prompt = engine_.WaitFor(0).generation;
  EXPECT_THAT(prompt.prompt, ElementsAre(1, 3 + 'H', 3 + 'i'));
  EXPECT_EQ(prompt.max_new_tokens, 0);
  EXPECT_EQ(prompt.first_position, 10u);
  EndPrompt();
  for (int i = 0; i < 3; ++i) {
    const GenerationRequest candidate = Candidate(i).generation;
    EXPECT_THAT(candidate.prompt, ElementsAre(3 + 'i'));
    EXPECT_EQ(candidate.first_position, 12u);
    EXPECT_THAT(*candidate.initial_state, ElementsAre(1.0f, 2.0f));
    EXPECT_EQ(candidate.final_state, nullptr);
    EXPECT_EQ(candidate.sampling.candidate, static_cast<uint32_t>(i));
    EXPECT_EQ(candidate.max_new_tokens, 9);
    EXPECT_EQ(candidate.min_new_tokens, 1);
    EXPECT_THAT(candidate.eos_token_ids, ElementsAre(2));
  }
}

TEST_F(CandidateGroupTest, EventsCarryTheirCandidateAndCountTheWholePrompt) {
  Start(2);
  EndPrompt();
  Candidate(1).sink->OnTokens(Tokens("b"));
  Candidate(0).sink->OnTokens(Tokens("a\xf0"));
  engine_.End(Candidate(0).handle, Result());
  writer_.CompleteAll(group_.get());
  EXPECT_FALSE(writer_.status().has_value());
  engine_.End(Candidate(1).handle, Result());
  writer_.CompleteAll(group_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 6u);
  EXPECT_EQ(events[0].started().prompt_tokens(), 3);
  EXPECT_EQ(events[1].delta().candidate(), 1u);
  EXPECT_EQ(events[1].delta().text(), "b");
  EXPECT_EQ(events[2].delta().candidate(), 0u);
  EXPECT_EQ(events[2].delta().text(), "a");
  EXPECT_EQ(events[3].delta().text(), "\xef\xbf\xbd");
  for (const int last : {4, 5}) {
    const v1::GenerationFinished& finished = events[last].finished();
    EXPECT_EQ(finished.candidate(), static_cast<uint32_t>(last - 4));
    EXPECT_EQ(finished.usage().prompt_tokens(), 3);
    EXPECT_EQ(finished.usage().cached_tokens(), 1);
    EXPECT_EQ(finished.usage().completion_tokens(), 5);
    EXPECT_EQ(finished.timings().queued().seconds(), 11);
    EXPECT_EQ(finished.timings().prefill().seconds(), 22);
    EXPECT_EQ(finished.timings().decode().seconds(), 30);
  }
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), IsOk());
}

TEST_F(CandidateGroupTest, ThePromptIsEchoedOnce) {
  GenerationStream::Options options;
  options.echo = true;
  options.prompt_logprobs = true;
  Start(2, options);
  EXPECT_TRUE(engine_.WaitFor(0).generation.prompt_logprobs);
  EXPECT_EQ(engine_.WaitFor(0).generation.prompt_top_logprobs, 4);
  engine_.WaitFor(0).sink->OnPromptLogprobs({-1.0f, -2.0f}, {});
  EndPrompt();
  for (const int i : {0, 1}) {
    EXPECT_FALSE(Candidate(i).generation.prompt_logprobs);
    EXPECT_EQ(Candidate(i).generation.prompt_top_logprobs, 0);
    engine_.End(Candidate(i).handle, Result());
  }
  writer_.CompleteAll(group_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[1].prompt().text(), "Hi");
  EXPECT_EQ(events[1].prompt().logprobs(2).logprob(), -2.0f);
  EXPECT_TRUE(events[2].has_finished());
}

TEST_F(CandidateGroupTest, BacklogIsThatOfTheCandidateAlone) {
  Start(2);
  EndPrompt();
  const std::shared_ptr<GenerationSink> first = Candidate(0).sink;
  const std::shared_ptr<GenerationSink> second = Candidate(1).sink;
  first->OnTokens(Tokens("abc"));
  second->OnTokens(Tokens("x"));
  first->OnTokens(Tokens("d"));
  EXPECT_EQ(first->backlog(), 4u);
  EXPECT_EQ(second->backlog(), 1u);
  writer_.CompleteWrite(group_.get());
  EXPECT_EQ(first->backlog(), 1u);
  EXPECT_EQ(second->backlog(), 1u);
  writer_.CompleteWrite(group_.get());
  EXPECT_EQ(second->backlog(), 0u);
}

TEST_F(CandidateGroupTest, AnErrorOfOneCandidateEndsTheCallWithItAndCancelsTheOthers) {
  Start(3);
  EndPrompt();
  Candidate(0).sink->OnTokens(Tokens("a"));
  engine_.End(Candidate(1).handle, absl::InternalError("the device failed"));
  engine_.WaitUntilIdle();
  EXPECT_FALSE(writer_.status().has_value()) << "a write is still in flight";
  writer_.CompleteAll(group_.get());
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("device")));
}

TEST_F(CandidateGroupTest, ARefusalOfThePromptOrOfACandidateEndsTheCallWithAnEstimate) {
  for (const bool of_prompt : {true, false}) {
    FakeEngine engine;
    FakeWriter writer;
    GenerationRequest request;
    request.prompt = {1};
    const auto group =
        std::make_shared<CandidateGroup>(2, GenerationStream::Options(), &engine, request, &writer);
    const absl::Status refusal = absl::ResourceExhaustedError("the queue is full");
    if (of_prompt) engine.Refuse(refusal);
    group->Start();
    if (!of_prompt) {
      writer.CompleteAll(group.get());
      engine.Refuse(refusal);
      engine.End(1, GenerationResult());
    }
    ASSERT_TRUE(writer.status().has_value());
    EXPECT_THAT(*writer.status(), StatusIs(absl::StatusCode::kResourceExhausted, _));
    EXPECT_TRUE(writer.status()->GetPayload(kRetryInfo).has_value());
    group->OnCancel(false);  // comes too late to matter
    EXPECT_EQ(engine.cancels(), 0);
  }
}

TEST_F(CandidateGroupTest, CancelFreesWhateverRuns) {
  for (const bool during_prompt : {true, false}) {
    FakeEngine engine;
    FakeWriter writer;
    GenerationRequest request;
    request.prompt = {1};
    const auto group =
        std::make_shared<CandidateGroup>(3, GenerationStream::Options(), &engine, request, &writer);
    group->Start();
    writer.CompleteAll(group.get());
    if (!during_prompt) engine.End(1, GenerationResult());
    group->OnCancel(false);
    engine.WaitUntilIdle();
    EXPECT_EQ(engine.cancels(), during_prompt ? 1 : 3);
    ASSERT_TRUE(writer.status().has_value());
    EXPECT_THAT(*writer.status(), StatusIs(absl::StatusCode::kCancelled, _));
  }
}

TEST_F(CandidateGroupTest, APassedDeadlineIsLeftToTheEngine) {
  Start(2);
  EndPrompt();
  group_->OnCancel(true);
  EXPECT_EQ(engine_.cancels(), 0);
  engine_.End(Candidate(0).handle, absl::DeadlineExceededError("the deadline passed"));
  engine_.WaitUntilIdle();
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kDeadlineExceeded, _));
}

// A real engine, a transport on a thread of its own.
class CandidatesTest : public testing::Test {
 protected:
  CandidatesTest() {
    ModelConfig config;
    config.vocab_size = FakeEngine::kVocabSize;
    config.hidden_size = 64;
    config.intermediate_size = 192;
    config.num_layers = 2;
    model_ = Model::Random(config, 1);
  }

  void StartEngine(int32_t slots, int32_t max_queue = 1024) {
    CpuBackendOptions backend_options;
    backend_options.threads = 2;
    backend_options.num_slots = slots;
    auto backend = CreateCpuBackend(model_, backend_options);
    ASSERT_THAT(backend, IsOk());
    Engine::Options options;
    options.model_name = "random";
    options.prefill_chunk = 7;
    options.max_queue = max_queue;
    auto engine = Engine::Create(options, model_, std::make_shared<FakeTokenizer>(),
                                 *std::move(backend), metrics_.get());
    ASSERT_THAT(engine, IsOk());
    engine_ = *std::move(engine);
  }

  GenerationRequest Request(size_t prompt_tokens, float temperature) const {
    GenerationRequest request;
    for (size_t i = 0; i < prompt_tokens; ++i) {
      request.prompt.push_back(static_cast<int32_t>((i * 37 + 5) % FakeEngine::kVocabSize));
    }
    request.sampling.temperature = temperature;
    request.sampling.seed = 42;
    request.max_new_tokens = 24;
    request.eos_token_ids = {2};
    return request;
  }
  // A frequency penalty: the draws depend on what the candidate itself has drawn.
  static std::shared_ptr<RequestSampler> Sampler(const GenerationRequest& request) {
    RequestSampler::Options options;
    options.penalties.frequency = 2.0f;
    options.penalties.repetition = 1.5f;
    options.filters.top_k = 100;
    return std::make_shared<RequestSampler>(options, FakeEngine::kVocabSize, request.prompt);
  }

  std::vector<int32_t> Alone(GenerationRequest request, uint32_t candidate) {
    request.sampling.candidate = candidate;
    const auto sink = std::make_shared<CollectingSink>();
    EXPECT_THAT(engine_->Submit(std::move(request), sink), IsOk());
    EXPECT_THAT(sink->WaitForEnd(), IsOk());
    return sink->ids();
  }

  // Runs a group to its end; `cancel_after`: writes until the client goes, -1: it stays. `best`: of
  // how many of them the outputs are sent, 0: of all, as they come.
  void Run(uint32_t candidates, const GenerationRequest& request, int cancel_after = -1,
           uint32_t best = 0) {
    GenerationStream::Options options;
    options.return_token_ids = true;
    options.prompt_logprobs = request.prompt_logprobs;
    options.cumulative_logprob = best > 0;
    FakeWriter writer;
    const auto ranking = std::make_shared<BestOf>(candidates, std::max(best, 1u), &writer);
    EventWriter* const out = best > 0 ? static_cast<EventWriter*>(ranking.get()) : &writer;
    const auto group =
        std::make_shared<CandidateGroup>(candidates, options, engine_.get(), request, out);
    if (best > 0) ranking->SetSource(group);
    EventSource* const source = best > 0 ? static_cast<EventSource*>(ranking.get()) : group.get();
    std::thread client([&] {
      for (int writes = 0; !writer.status().has_value(); ++writes) {
        if (writes == cancel_after) source->OnCancel(false);
        writer.AwaitWriteOrEnd();
        // Once gone, nothing more is taken.
        writer.CompleteWrite(source, cancel_after < 0 || writes < cancel_after);
      }
    });
    group->Start();
    client.join();
    status_ = *writer.status();
    outputs_.assign(candidates, {});
    finished_ = 0;
    for (const v1::GenerateResponse& event : writer.events()) {
      for (const int32_t id : event.delta().token_ids()) {
        outputs_[event.delta().candidate()].push_back(id);
      }
      finished_ += event.has_finished() ? 1 : 0;
    }
  }

  std::shared_ptr<const Model> model_;
  prometheus::Registry registry_;
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(&registry_);
  std::unique_ptr<Engine> engine_;
  absl::Status status_;
  std::vector<std::vector<int32_t>> outputs_;
  uint32_t finished_ = 0;
};

TEST_F(CandidatesTest, EachIsTheLoneRequestWithItsNumber) {
  StartEngine(4);
  for (const size_t prompt : {1, 2, 7, 8, 50}) {
    for (const bool penalties : {false, true}) {
      const GenerationRequest request = Request(prompt, 1.0f);
      GenerationRequest shared = request;
      if (penalties) shared.sampler = Sampler(request);
      Run(6, shared);
      ASSERT_THAT(status_, IsOk());
      EXPECT_NE(outputs_[0], outputs_[1]);
      for (uint32_t i = 0; i < 6; ++i) {
        GenerationRequest lone = request;
        if (penalties) lone.sampler = Sampler(request);
        EXPECT_EQ(outputs_[i], Alone(lone, i)) << "prompt " << prompt << ", candidate " << i;
      }
    }
  }
}

TEST_F(CandidatesTest, GreedyOnesAreAllTheLoneOutput) {
  StartEngine(4);
  GenerationRequest request = Request(20, 0.0f);
  request.prompt_logprobs = true;
  Run(5, request);
  request.prompt_logprobs = false;
  ASSERT_THAT(status_, IsOk());
  for (const std::vector<int32_t>& output : outputs_) EXPECT_EQ(output, Alone(request, 0));
}

TEST_F(CandidatesTest, ThePromptIsComputedOnceAndItsLastTokenForEach) {
  StartEngine(4);
  Run(8, Request(100, 1.0f));
  ASSERT_THAT(status_, IsOk());
  EXPECT_EQ(MetricValue(registry_, "mmfree_prompt_tokens_total"), 100 + 8);
}

TEST_F(CandidatesTest, TheMostOfThemFinishWithTwoSlots) {
  StartEngine(2);
  Run(64, Request(30, 1.0f));
  ASSERT_THAT(status_, IsOk());
  EXPECT_EQ(finished_, 64u);
  for (const uint32_t i : {0, 31, 63}) EXPECT_EQ(outputs_[i], Alone(Request(30, 1.0f), i));
}

TEST_F(CandidatesTest, ThoseThatWereQueuedAreFreedWhenTheNextIsRefused) {
  StartEngine(1, /*max_queue=*/2);
  GenerationRequest request = Request(5, 1.0f);
  request.max_new_tokens = 10'000;
  request.eos_token_ids.clear();
  Run(16, request);
  EXPECT_THAT(status_, StatusIs(absl::StatusCode::kResourceExhausted, _));
  EXPECT_TRUE(status_.GetPayload(kRetryInfo).has_value());
  const Engine::Load load = engine_->load();
  EXPECT_EQ(load.running + load.queued + load.slots_used, 0);
}

TEST_F(CandidatesTest, AClientThatGoesAtAnyMomentFreesEverything) {
  StartEngine(3);
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    const int cancel_after = static_cast<int>(random() % 12);
    const uint32_t candidates = 1 + random() % 6;
    const uint32_t best = random() % (candidates + 1);
    Run(candidates, Request(1 + random() % 20, 1.0f), cancel_after, best);
    EXPECT_TRUE(status_.ok() || absl::IsCancelled(status_)) << status_;
    const Engine::Load load = engine_->load();
    EXPECT_EQ(load.running + load.queued + load.slots_used, 0);
    EXPECT_EQ(load.tokens_in_flight, 0);
  }
}

}  // namespace
}  // namespace mmfree
