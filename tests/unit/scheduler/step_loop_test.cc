// What requests get from the step loop when nothing goes wrong.
#include "server/scheduler/step_loop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

using ::testing::ElementsAreArray;
using ::testing::IsEmpty;

using StepLoopTest = StepLoopFixture;

TEST_F(StepLoopTest, ConcurrentRequestsGetTheTokensTheyWouldGetAlone) {
  for (const int chunk : {1, 5, 64}) {
    for (const int budget : {1, 7, 64}) {
      SCOPED_TRACE(::testing::Message() << "chunk " << chunk << ", budget " << budget);
      options_.policy.prefill_chunk = chunk;
      options_.policy.step_token_budget = budget;
      options_.delivery_threads = 2;
      device_options_.num_slots = 5;
      Start();
      std::vector<std::shared_ptr<CollectingSink>> sinks;
      std::vector<GenerationRequest> requests;
      for (int i = 0; i < 24; ++i) {
        GenerationRequest request = Generation(Prompt(1 + i * 3 % 40, i), 1 + i * 5 % 30);
        if (i % 2 == 1) {
          request.sampling.temperature = 0.8f;
          request.sampling.seed = static_cast<uint64_t>(i);
        }
        requests.push_back(request);
        sinks.push_back(std::make_shared<CollectingSink>());
        MustSubmit(request, sinks.back());
      }
      for (size_t i = 0; i < sinks.size(); ++i) {
        const absl::StatusOr<GenerationResult>& result = sinks[i]->WaitForEnd();
        ASSERT_TRUE(result.ok()) << result.status();
        EXPECT_EQ(result->reason, FinishReason::kLength);
        EXPECT_EQ(result->usage.prompt_tokens, static_cast<int64_t>(requests[i].prompt.size()));
        EXPECT_EQ(result->usage.completion_tokens, requests[i].max_new_tokens);
        EXPECT_THAT(sinks[i]->ids(),
                    ElementsAreArray(ExpectedIds(requests[i].prompt,
                                                 static_cast<int>(requests[i].max_new_tokens),
                                                 requests[i].sampling)));
      }
      EXPECT_THAT(device_->violations(), IsEmpty());
    }
  }
}

TEST_F(StepLoopTest, ARequestGoesOnFromAGivenStateAsIfItHadNeverStopped) {
  Start();
  const std::vector<int32_t> context = Prompt(30);
  for (const size_t split : {1, 7, 29}) {
    const absl::Span<const int32_t> before = absl::MakeConstSpan(context).first(split);
    GenerationRequest request = Generation({context.begin() + split, context.end()}, 12);
    request.first_position = split;
    request.initial_state =
        std::make_shared<const std::vector<float>>(FakeDevice::ExpectedState(before));
    request.sampling.temperature = 1.0f;
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(request, sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(context, 12, request.sampling)));
  }
}

TEST_F(StepLoopTest, AStateOfAnotherSizeIsRefused) {
  Start();
  GenerationRequest request = Generation(Prompt(3), 1);
  request.initial_state = std::make_shared<const std::vector<float>>(3);
  EXPECT_EQ(loop_->Submit(request, std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(StepLoopTest, TokensCarryTheirLogprobs) {
  Start();
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(5), 10), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  const std::vector<SampledToken> expected = device_->Expected(Prompt(5), {}, 10);
  const std::vector<SampledToken> tokens = sink->tokens();
  ASSERT_EQ(tokens.size(), expected.size());
  for (size_t i = 0; i < tokens.size(); ++i) EXPECT_EQ(tokens[i].logprob, expected[i].logprob);
}

TEST_F(StepLoopTest, TheLastSampledTokenIsNotFed) {
  Start();
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(20), 10), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  int fed = 0;
  int sampled = 0;
  for (const FakeDevice::StepRecord& step : device_->steps()) {
    for (const FakeDevice::Row& row : step) {
      fed += row.tokens;
      sampled += row.sampled;
    }
  }
  EXPECT_EQ(fed, 20 + 9);
  EXPECT_EQ(sampled, 10);  // with the last chunk of the prompt and each decoded token
}

TEST_F(StepLoopTest, NoNewTokensOnlyFeedsThePrompt) {
  Start();
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(20), 0), sink);
  const absl::StatusOr<GenerationResult>& result = sink->WaitForEnd();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->reason, FinishReason::kLength);
  EXPECT_EQ(result->usage.completion_tokens, 0);
  EXPECT_THAT(sink->ids(), IsEmpty());
  int fed = 0;
  for (const FakeDevice::StepRecord& step : device_->steps()) {
    for (const FakeDevice::Row& row : step) {
      fed += row.tokens;
      EXPECT_FALSE(row.sampled);
    }
  }
  EXPECT_EQ(fed, 20);
}

TEST_F(StepLoopTest, EosAndStopTokensEndTheStreamAndAreNotEmitted) {
  Start();
  const std::vector<int32_t> free_run = ExpectedIds(Prompt(5), 30);
  const int32_t end = free_run[11];
  const size_t first = std::find(free_run.begin(), free_run.end(), end) - free_run.begin();
  for (const bool eos : {true, false}) {
    GenerationRequest request = Generation(Prompt(5), 1000);
    (eos ? request.eos_token_ids : request.stop_token_ids) = {end};
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(request, sink);
    const absl::StatusOr<GenerationResult>& result = sink->WaitForEnd();
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->reason, eos ? FinishReason::kEos : FinishReason::kStopToken);
    EXPECT_EQ(result->matched_stop_token, end);
    EXPECT_EQ(result->usage.completion_tokens, static_cast<int64_t>(first));
    EXPECT_THAT(sink->ids(), ElementsAreArray(free_run.data(), first));
  }
  EXPECT_EQ(Outcomes("eos"), 1);
  EXPECT_EQ(Outcomes("stop_token"), 1);
}

TEST_F(StepLoopTest, EndingTokensAreNotDrawnBeforeTheMinimum) {
  device_options_.vocab_size = 7;  // they would come soon
  Start();
  GenerationRequest request = Generation({1, 2, 3}, 1000);
  request.eos_token_ids = {2};
  request.stop_token_ids = {4, 5};
  request.min_new_tokens = 25;
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(request, sink);
  const absl::StatusOr<GenerationResult>& result = sink->WaitForEnd();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NE(result->reason, FinishReason::kLength);

  SamplingParams banned;
  const std::vector<int32_t> ends = {2, 4, 5};
  banned.banned = ends;
  std::vector<int32_t> expected = ExpectedIds({1, 2, 3}, 25, banned);
  std::vector<int32_t> context = {1, 2, 3};
  context.insert(context.end(), expected.begin(), expected.end());
  for (const int32_t id : ExpectedIds(context, 1000)) {
    if (std::count(ends.begin(), ends.end(), id) > 0) {
      EXPECT_EQ(result->matched_stop_token, id);
      break;
    }
    expected.push_back(id);
  }
  EXPECT_THAT(sink->ids(), ElementsAreArray(expected));
}

TEST_F(StepLoopTest, AMinimumAboveTheMaximumEndsAtTheMaximum) {
  device_options_.vocab_size = 3;
  Start();
  GenerationRequest request = Generation({1}, 10);
  request.eos_token_ids = {2};
  request.min_new_tokens = 20;
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(request, sink);
  const absl::StatusOr<GenerationResult>& result = sink->WaitForEnd();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->reason, FinishReason::kLength);
  EXPECT_EQ(sink->ids().size(), 10u);
}

TEST_F(StepLoopTest, ScoresAreOfEachTokenGivenThoseBeforeIt) {
  for (const int chunk : {1, 3, 64}) {
    options_.policy.prefill_chunk = chunk;
    Start();
    for (const int length : {1, 2, 3, 4, 50}) {
      SCOPED_TRACE(::testing::Message() << "chunk " << chunk << ", length " << length);
      ScoreRequest request;
      request.tokens = Prompt(length, length);
      request.last_logits = length % 2 == 1;
      // Generations step together with it.
      auto generation = std::make_shared<CollectingSink>();
      MustSubmit(Generation(Prompt(3), 20), generation);
      auto sink = std::make_shared<CollectingScoreSink>();
      ASSERT_TRUE(loop_->Submit(request, sink).ok());
      const absl::StatusOr<ScoreResult>& result = sink->WaitForEnd();
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_EQ(result->argmax.size(), static_cast<size_t>(length));
      ASSERT_EQ(result->logprobs.size(), static_cast<size_t>(length) - 1);
      for (int i = 0; i < length; ++i) {
        const auto before = absl::MakeConstSpan(request.tokens).first(i + 1);
        const int32_t target = i + 1 < length ? request.tokens[i + 1] : -1;
        const TokenScore expected = device_->ExpectedScore(before, target);
        EXPECT_EQ(result->argmax[i], expected.argmax);
        if (target >= 0) {
          EXPECT_EQ(result->logprobs[i], expected.logprob);
        }
      }
      EXPECT_THAT(result->last_logits,
                  ElementsAreArray(request.last_logits ? device_->ExpectedLogits(request.tokens)
                                                       : std::vector<float>()));
      ASSERT_TRUE(generation->WaitForEnd().ok());
      EXPECT_THAT(generation->ids(), ElementsAreArray(ExpectedIds(Prompt(3), 20)));
    }
    EXPECT_THAT(device_->violations(), IsEmpty());
  }
  EXPECT_EQ(Outcomes("scored"), 15);
}

TEST_F(StepLoopTest, APromptFloodDoesNotMakeADecodingStreamMissAStep) {
  device_options_.num_slots = 8;
  Start();
  device_->CloseGate();
  auto stream = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(4), 60), stream);
  std::vector<std::shared_ptr<CollectingSink>> flood;
  for (int i = 0; i < 20; ++i) {
    flood.push_back(std::make_shared<CollectingSink>());
    MustSubmit(Generation(Prompt(500, i), 1), flood.back());
  }
  device_->OpenGate();
  ASSERT_TRUE(stream->WaitForEnd().ok());
  for (const auto& sink : flood) ASSERT_TRUE(sink->WaitForEnd().ok());
  // The stream has slot 0; from its first decoded token to its last it is in every step, and each
  // step is within the budget.
  std::vector<int64_t> decoded;
  const std::vector<FakeDevice::StepRecord> steps = device_->steps();
  for (size_t s = 0; s < steps.size(); ++s) {
    int tokens = 0;
    for (const FakeDevice::Row& row : steps[s]) {
      tokens += row.tokens;
      if (row.slot == 0 && row.position >= 4 && row.position < 63 && row.tokens == 1 &&
          row.sampled && decoded.size() < 59) {
        decoded.push_back(static_cast<int64_t>(s));
      }
    }
    EXPECT_LE(tokens, 64);
  }
  ASSERT_EQ(decoded.size(), 59u);
  EXPECT_EQ(decoded.back() - decoded.front(), 58);
}

TEST_F(StepLoopTest, TokensOfSeveralStepsReachASlowSinkTogether) {
  // A sink that blocks its delivery thread until told otherwise.
  class Gated final : public GenerationSink {
   public:
    void OnTokens(absl::Span<const SampledToken> tokens) override {
      absl::MutexLock lock(&mutex, absl::Condition(&open));
      ++calls;
      total += tokens.size();
    }
    void OnFinished(const absl::StatusOr<GenerationResult>&) override {
      absl::MutexLock lock(&mutex);
      done = true;
    }
    size_t backlog() const override { return 0; }
    absl::Mutex mutex;
    bool open = false;
    bool done = false;
    int calls = 0;
    size_t total = 0;
  };
  Start();
  auto sink = std::make_shared<Gated>();
  MustSubmit(Generation(Prompt(4), 100), sink);
  device_->WaitForSteps(100);
  absl::MutexLock lock(&sink->mutex);
  sink->open = true;
  sink->mutex.Await(absl::Condition(&sink->done));
  EXPECT_EQ(sink->total, 100u);
  EXPECT_LE(sink->calls, 3);
}

TEST_F(StepLoopTest, AnIdleReaderPausesItsOwnRowOnlyAndGoesOnWhereItWas) {
  options_.max_stream_backlog = 16;
  Start();
  auto idle = std::make_shared<CollectingSink>(CollectingSink::Reader::kIdle);
  auto eager = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(4), 200), idle);
  MustSubmit(Generation(Prompt(4, 1), 500), eager);
  ASSERT_TRUE(eager->WaitForEnd().ok());
  // It stays paused at its limit while the other runs to its end.
  EXPECT_FALSE(idle->ended());
  EXPECT_GT(idle->ids().size(), 8u);
  EXPECT_LE(idle->ids().size(), 17u);
  EXPECT_EQ(Metric("mmfree_num_requests_paused"), 1);
  EXPECT_EQ(loop_->load().running, 1);

  // Reading less than half of it keeps it paused; reading on resumes it.
  idle->StartReading();
  ASSERT_TRUE(idle->WaitForEnd().ok());
  EXPECT_THAT(idle->ids(), ElementsAreArray(ExpectedIds(Prompt(4), 200)));
  EXPECT_THAT(eager->ids(), ElementsAreArray(ExpectedIds(Prompt(4, 1), 500)));
}

TEST_F(StepLoopTest, MemoryOfAStreamIsBoundedHoweverManyNeverRead) {
  options_.max_stream_backlog = 10;
  device_options_.num_slots = 400;
  options_.policy.max_batch = 400;
  options_.policy.step_token_budget = 400;
  Start();
  std::vector<std::shared_ptr<CollectingSink>> readers;
  for (int i = 0; i < 400; ++i) {
    readers.push_back(std::make_shared<CollectingSink>(CollectingSink::Reader::kIdle));
    MustSubmit(Generation(Prompt(1, i), 1'000'000), readers.back());
  }
  for (const auto& reader : readers) reader->WaitForTokens(6);
  loop_->Drain(absl::InfinitePast());
  for (const auto& reader : readers) {
    EXPECT_EQ(reader->WaitForEnd().status().code(), absl::StatusCode::kUnavailable);
    EXPECT_LE(reader->ids().size(), 11u);
  }
}

TEST_F(StepLoopTest, ATimeIsMeasuredFromSubmissionToFirstStepTokenAndEnd) {
  device_options_.num_slots = 1;
  device_options_.step_time = absl::Milliseconds(10);
  Start();
  device_->CloseGate();
  auto first = std::make_shared<CollectingSink>();
  auto second = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(8), 4), first);  // one step of prefill, three of decode
  device_->WaitUntilHeldUp();
  MustSubmit(Generation(Prompt(20), 3), second);  // three and two
  device_->OpenGate();
  ASSERT_TRUE(first->WaitForEnd().ok());
  const absl::StatusOr<GenerationResult>& result = second->WaitForEnd();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(first->WaitForEnd()->timings.queued, absl::ZeroDuration());
  EXPECT_EQ(first->WaitForEnd()->timings.prefill, absl::Milliseconds(10));
  EXPECT_EQ(first->WaitForEnd()->timings.decode, absl::Milliseconds(30));
  EXPECT_EQ(result->timings.queued, absl::Milliseconds(40));
  EXPECT_EQ(result->timings.prefill, absl::Milliseconds(30));
  EXPECT_EQ(result->timings.decode, absl::Milliseconds(20));

  EXPECT_EQ(Metric("mmfree_request_queue_time_seconds"), 2);
  EXPECT_EQ(Metric("mmfree_time_to_first_token_seconds"), 2);
  EXPECT_EQ(Metric("mmfree_inter_token_latency_seconds"), 3 + 2);
  EXPECT_EQ(Metric("mmfree_e2e_request_latency_seconds"), 2);
  EXPECT_EQ(Metric("mmfree_step_duration_seconds", "kind", "prefill"), 4);
  EXPECT_EQ(Metric("mmfree_step_duration_seconds", "kind", "decode"), 5);
  EXPECT_EQ(Metric("mmfree_prompt_tokens_total"), 28);
  EXPECT_EQ(Metric("mmfree_generation_tokens_total"), 7);
  EXPECT_EQ(Outcomes("length"), 2);
}

TEST_F(StepLoopTest, AMixedStepIsCountedAsOne) {
  Start();
  device_->CloseGate();
  auto first = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(8), 4), first);
  device_->WaitUntilHeldUp();
  auto second = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(8), 1), second);
  device_->OpenGate();
  ASSERT_TRUE(first->WaitForEnd().ok());
  ASSERT_TRUE(second->WaitForEnd().ok());
  EXPECT_EQ(Metric("mmfree_step_duration_seconds", "kind", "prefill"), 1);
  EXPECT_EQ(Metric("mmfree_step_duration_seconds", "kind", "mixed"), 1);
  EXPECT_EQ(Metric("mmfree_step_duration_seconds", "kind", "decode"), 2);
}

}  // namespace
}  // namespace mmfree
