// How requests end otherwise: refused, cancelled, overdue, on a fault, while draining.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

using StepLoopEndsTest = StepLoopFixture;

// Requests in every phase, with the next step held up at the gate.
class EveryPhaseTest : public StepLoopFixture {
 protected:
  struct Victim {
    const char* phase;
    std::shared_ptr<CollectingSink> sink;
    RequestHandle handle;
  };

  void Occupy(absl::Duration deadline_after) {
    device_options_.num_slots = 3;
    options_.max_stream_backlog = 4;
    Start();
    const auto submit = [&](const char* phase, int prompt, Priority priority,
                            CollectingSink::Reader reader = CollectingSink::Reader::kEager) {
      auto sink = std::make_shared<CollectingSink>(reader);
      GenerationRequest request = Generation(Prompt(prompt), 1'000'000);
      request.deadline = clock_.Now() + deadline_after;
      request.priority = priority;
      const RequestHandle handle = MustSubmit(request, sink);
      victims_.push_back({phase, sink, handle});
    };
    device_->CloseGate();
    submit("parked", 4, Priority::kHigh, CollectingSink::Reader::kIdle);
    device_->WaitUntilHeldUp();
    submit("decoding", 4, Priority::kNormal);
    submit("preempted", 4, Priority::kLow);
    // Step by step, so that the eager readers never lag.
    for (size_t tokens = 1; tokens < 8; ++tokens) {
      device_->ReleaseSteps(1);
      device_->WaitUntilHeldUp();
      victims_[1].sink->WaitForTokens(tokens - 1);
      victims_[2].sink->WaitForTokens(tokens - 1);
    }
    ASSERT_EQ(Metric("mmfree_num_requests_paused"), 1);
    ASSERT_EQ(loop_->load().running, 3);
    submit("prefilling", 1'000'000, Priority::kNormal);
    submit("prefilling too", 1'000'000, Priority::kNormal);
    submit("queued", 4, Priority::kLow);
    device_->ReleaseSteps(3);
    device_->WaitUntilHeldUp();
    ASSERT_EQ(loop_->load().running, 3);
    ASSERT_EQ(loop_->load().waiting, 1);
    ASSERT_EQ(loop_->load().preempted, 1);
    ASSERT_EQ(loop_->load().paused, 1);
  }

  // All end with `code` in the one step that was under way, and nothing is left.
  void ExpectAllEnd(absl::StatusCode code) {
    device_->ReleaseSteps(1);
    for (const Victim& victim : victims_) {
      EXPECT_EQ(victim.sink->WaitForEnd().status().code(), code) << victim.phase;
    }
    EXPECT_EQ(loop_->load().running, 0);
    EXPECT_EQ(loop_->load().waiting, 0);
    EXPECT_EQ(loop_->load().waiting_tokens, 0);
    EXPECT_EQ(loop_->load().preempted, 0);
    EXPECT_EQ(loop_->load().paused, 0);
    EXPECT_EQ(loop_->load().tokens_in_flight, 0);
    device_->OpenGate();
    // The slots are free and clean.
    for (int i = 0; i < 4; ++i) {
      auto sink = std::make_shared<CollectingSink>();
      MustSubmit(Generation(Prompt(9, i), 9), sink);
      ASSERT_TRUE(sink->WaitForEnd().ok());
      EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(Prompt(9, i), 9)));
    }
  }

  std::vector<Victim> victims_;
};

TEST_F(EveryPhaseTest, CancellationTakesEffectWithinOneStep) {
  ASSERT_NO_FATAL_FAILURE(Occupy(absl::InfiniteDuration()));
  for (const Victim& victim : victims_) loop_->Cancel(victim.handle);
  ExpectAllEnd(absl::StatusCode::kCancelled);
  EXPECT_EQ(Outcomes("cancelled"), 6);
}

TEST_F(EveryPhaseTest, ADeadlineTakesEffectWithinOneStep) {
  ASSERT_NO_FATAL_FAILURE(Occupy(absl::Hours(1)));
  clock_.Advance(absl::Hours(2));
  ExpectAllEnd(absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Outcomes("deadline_exceeded"), 6);
  EXPECT_EQ(Outcomes("length"), 4);  // those that came after, not these
}

TEST_F(EveryPhaseTest, ADrainEndsAtItsDeadline) {
  ASSERT_NO_FATAL_FAILURE(Occupy(absl::InfiniteDuration()));
  std::thread drain([this] { loop_->Drain(clock_.Now() + absl::Minutes(1)); });
  // Nothing new is taken while it drains. Until then the queue takes some, and may fill up.
  const auto submit = [this] {
    return loop_->Submit(Generation(Prompt(1), 1), std::make_shared<CollectingSink>()).status();
  };
  while (!absl::IsUnavailable(submit())) std::this_thread::yield();
  device_->ReleaseSteps(1);
  device_->WaitUntilHeldUp();
  for (const Victim& victim : victims_) EXPECT_FALSE(victim.sink->ended()) << victim.phase;
  clock_.Advance(absl::Minutes(1));
  device_->OpenGate();
  drain.join();
  for (const Victim& victim : victims_) {
    ASSERT_TRUE(victim.sink->ended()) << victim.phase;
    EXPECT_EQ(victim.sink->WaitForEnd().status().code(), absl::StatusCode::kUnavailable);
  }
}

TEST_F(EveryPhaseTest, DestructionEndsEverything) {
  ASSERT_NO_FATAL_FAILURE(Occupy(absl::InfiniteDuration()));
  std::thread destroy([this] { loop_.reset(); });
  device_->OpenGate();
  destroy.join();
  for (const Victim& victim : victims_) {
    ASSERT_TRUE(victim.sink->ended()) << victim.phase;
    EXPECT_EQ(victim.sink->WaitForEnd().status().code(), absl::StatusCode::kUnavailable);
  }
}

TEST_F(EveryPhaseTest, ADeviceFaultFailsTheStepAndEndsTheService) {
  ASSERT_NO_FATAL_FAILURE(Occupy(absl::InfiniteDuration()));
  device_->FailNextStep(absl::InternalError("the device fell off the bus"));
  device_->ReleaseSteps(1);
  for (const Victim& victim : victims_) {
    const bool in_step =
        absl::StartsWith(victim.phase, "decoding") || absl::StartsWith(victim.phase, "prefilling");
    EXPECT_EQ(victim.sink->WaitForEnd().status().code(),
              in_step ? absl::StatusCode::kInternal : absl::StatusCode::kUnavailable)
        << victim.phase;
  }
  EXPECT_EQ(faults_, 1);
  EXPECT_EQ(Outcomes("internal"), 3);
  EXPECT_EQ(loop_->load().running, 0);
  EXPECT_EQ(loop_->load().waiting, 0);
  const auto refused = loop_->Submit(Generation(Prompt(1), 1), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  device_->OpenGate();
}

TEST_F(StepLoopEndsTest, ACallTheBackendRefusesFailsItsRowsAndNothingElse) {
  Start();
  device_->CloseGate();
  auto failed = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(4), 10), failed);
  device_->WaitUntilHeldUp();
  auto next = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(4), 10), next);
  device_->FailNextStep(absl::InvalidArgumentError("too many cooks"));
  device_->OpenGate();
  EXPECT_EQ(failed->WaitForEnd().status().code(), absl::StatusCode::kInternal);
  ASSERT_TRUE(next->WaitForEnd().ok());
  EXPECT_THAT(next->ids(), ElementsAreArray(ExpectedIds(Prompt(4), 10)));
  EXPECT_EQ(faults_, 0);
}

TEST_F(StepLoopEndsTest, ASlotThatCannotBeZeroedIsAFault) {
  Start();
  device_->FailNextZeroSlot(absl::InternalError("no"));
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(4), 10), sink);
  EXPECT_EQ(sink->WaitForEnd().status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(faults_, 1);
  EXPECT_EQ(device_->num_steps(), 0);
}

TEST_F(StepLoopEndsTest, TheQueueIsBoundedInRequestsAndTokens) {
  device_options_.num_slots = 2;
  options_.max_queue = 3;
  options_.max_queue_tokens = 1000;
  Start();
  device_->CloseGate();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  const auto submit = [&](int prompt) {
    auto sink = std::make_shared<CollectingSink>();
    const absl::Status status = loop_->Submit(Generation(Prompt(prompt), 1), sink).status();
    if (status.ok()) sinks.push_back(sink);
    return status;
  };
  // Two slots and three places, whether or not the step thread has come round to admitting.
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(submit(100).ok()) << i;
  EXPECT_EQ(submit(1).code(), absl::StatusCode::kResourceExhausted);
  device_->OpenGate();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->WaitForEnd().ok());

  sinks.clear();
  device_->CloseGate();
  ASSERT_TRUE(submit(100).ok());
  device_->WaitUntilHeldUp();  // it has its slot
  EXPECT_TRUE(submit(600).ok());
  EXPECT_THAT(submit(401), ::testing::Property(&absl::Status::message, HasSubstr("1000")));
  EXPECT_TRUE(submit(400).ok());
  EXPECT_EQ(submit(1).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(loop_->load().waiting_tokens, 1000);
  device_->OpenGate();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->WaitForEnd().ok());
  EXPECT_EQ(Outcomes("resource_exhausted"), 3);
  EXPECT_EQ(Outcomes("length"), 5 + 3);
}

TEST_F(StepLoopEndsTest, APlaceIsFreeAsSoonAsAnEndIsHeardOf) {
  device_options_.num_slots = 1;
  options_.max_queue = 0;
  Start();
  for (int i = 0; i < 200; ++i) {
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(Generation(Prompt(1, i), 2), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    ASSERT_EQ(Metric("mmfree_state_slots_used"), 0);
    ASSERT_EQ(Outcomes("length"), i + 1);
  }
}

TEST_F(StepLoopEndsTest, WhatWouldHarmOthersIsRefusedByName) {
  Start();
  const auto submit = [&](std::function<void(GenerationRequest*)> change) {
    GenerationRequest request = Generation(Prompt(3), 1);
    change(&request);
    auto sink = std::make_shared<CollectingSink>();
    const absl::Status status = loop_->Submit(request, sink).status();
    EXPECT_FALSE(sink->ended());
    return status;
  };
  const absl::Status out_of_range = submit([](auto* r) { r->prompt[1] = 97; });
  EXPECT_EQ(out_of_range.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(out_of_range.message()), HasSubstr("prompt[1] is 97"));
  for (const auto& change : std::vector<std::function<void(GenerationRequest*)>>{
           [](auto* r) { r->prompt[0] = -1; }, [](auto* r) { r->prompt.clear(); },
           [](auto* r) { r->max_new_tokens = -1; }, [](auto* r) { r->eos_token_ids = {97}; },
           [](auto* r) { r->stop_token_ids.assign(kMaxBannedTokens + 1, 5); }}) {
    EXPECT_EQ(submit(change).code(), absl::StatusCode::kInvalidArgument);
  }
  const absl::Status overdue = submit([&](auto* r) { r->deadline = clock_.Now(); });
  EXPECT_EQ(overdue.code(), absl::StatusCode::kDeadlineExceeded);
  ScoreRequest nothing;
  EXPECT_EQ(loop_->Submit(nothing, std::make_shared<CollectingScoreSink>()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Outcomes("invalid_argument"), 7);
  EXPECT_EQ(Outcomes("deadline_exceeded"), 1);
}

TEST_F(StepLoopEndsTest, ScoreRequestsAreCancelledToo) {
  Start();
  device_->CloseGate();
  ScoreRequest request;
  request.tokens = Prompt(1000);
  auto sink = std::make_shared<CollectingScoreSink>();
  const absl::StatusOr<RequestHandle> handle = loop_->Submit(request, sink);
  ASSERT_TRUE(handle.ok());
  device_->WaitUntilHeldUp();
  loop_->Cancel(*handle);
  device_->ReleaseSteps(1);
  EXPECT_EQ(sink->WaitForEnd().status().code(), absl::StatusCode::kCancelled);
  device_->OpenGate();
}

TEST_F(StepLoopEndsTest, CancellingWhatHasEndedOrNeverWasDoesNothing) {
  Start();
  auto sink = std::make_shared<CollectingSink>();
  const RequestHandle handle = MustSubmit(Generation(Prompt(3), 3), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  loop_->Cancel(handle);
  loop_->Cancel(handle + 1000);
  loop_->Cancel(0);
  auto next = std::make_shared<CollectingSink>();
  EXPECT_EQ(MustSubmit(Generation(Prompt(3), 3), next), handle + 1);
  ASSERT_TRUE(next->WaitForEnd().ok());
}

TEST_F(StepLoopEndsTest, ADrainWithoutHasteLetsEverythingFinish) {
  device_options_.num_slots = 2;
  Start();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 10; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    MustSubmit(Generation(Prompt(20, i), 50), sinks.back());
  }
  loop_->Drain(absl::InfiniteFuture());
  for (size_t i = 0; i < sinks.size(); ++i) {
    ASSERT_TRUE(sinks[i]->ended());  // before Drain returned
    EXPECT_TRUE(sinks[i]->WaitForEnd().ok());
  }
  loop_->Drain(absl::InfiniteFuture());
  const auto refused = loop_->Submit(Generation(Prompt(1), 1), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Outcomes("unavailable"), 1);
}

TEST_F(StepLoopEndsTest, ASinkMaySubmitAndCancelFromItsCallbacks) {
  Start();
  // Cancels itself at its first token and then submits a successor, `left` times.
  class Chain final : public GenerationSink {
   public:
    Chain(StepLoop* loop, int left, std::shared_ptr<CollectingSink> last)
        : loop_(loop), left_(left), last_(std::move(last)) {}
    void OnTokens(absl::Span<const SampledToken>) override {
      loop_->Cancel(static_cast<RequestHandle>(handle));
    }
    void OnFinished(const absl::StatusOr<GenerationResult>& result) override {
      EXPECT_EQ(result.status().code(), absl::StatusCode::kCancelled);
      if (left_ == 0) return last_->OnFinished(result);
      Submit(loop_, left_ - 1, last_);
    }
    size_t backlog() const override { return 0; }

    static void Submit(StepLoop* loop, int left, const std::shared_ptr<CollectingSink>& last) {
      auto sink = std::make_shared<Chain>(loop, left, last);
      Chain* const chain = sink.get();
      GenerationRequest request = Generation({1}, 1'000'000);
      const absl::StatusOr<RequestHandle> handle = loop->Submit(request, std::move(sink));
      ASSERT_TRUE(handle.ok());
      chain->handle = *handle;
    }
    std::atomic<RequestHandle> handle{0};

   private:
    StepLoop* const loop_;
    const int left_;
    const std::shared_ptr<CollectingSink> last_;
  };
  auto last = std::make_shared<CollectingSink>();
  Chain::Submit(loop_.get(), 20, last);
  last->WaitForEnd();
  EXPECT_EQ(Outcomes("cancelled"), 21);
}

TEST_F(StepLoopEndsTest, UnderRandomCancelsFromManyThreadsThoseThatFinishGetTheirTokens) {
  options_.delivery_threads = 2;
  options_.max_stream_backlog = 8;
  options_.max_queue = 10000;
  device_options_.num_slots = 16;
  Start();
  constexpr int kThreads = 4;
  constexpr int kRequests = 250;
  std::vector<std::thread> threads;
  std::atomic<int> finished{0};
  std::atomic<int> cancelled{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      struct Submitted {
        std::shared_ptr<CollectingSink> sink;
        GenerationRequest request;
      };
      std::vector<Submitted> all;
      std::vector<RequestHandle> handles;
      for (int i = 0; i < kRequests; ++i) {
        GenerationRequest request =
            Generation(Prompt(1 + random() % 50, t * kRequests + i), 1 + random() % 40);
        if (random() % 2 == 0) {
          request.sampling.temperature = 1.0f;
          request.sampling.seed = random();
        }
        const auto reader =
            random() % 4 == 0 ? CollectingSink::Reader::kIdle : CollectingSink::Reader::kEager;
        all.push_back({std::make_shared<CollectingSink>(reader), request});
        handles.push_back(MustSubmit(request, all.back().sink));
        if (random() % 3 == 0) loop_->Cancel(handles[random() % handles.size()]);
        if (random() % 3 == 0) all[random() % all.size()].sink->Read(random() % 20);
      }
      for (const Submitted& submitted : all) submitted.sink->StartReading();
      for (const Submitted& submitted : all) {
        const absl::StatusOr<GenerationResult>& result = submitted.sink->WaitForEnd();
        const std::vector<int32_t> expected = ExpectedIds(
            submitted.request.prompt, static_cast<int>(submitted.request.max_new_tokens),
            submitted.request.sampling);
        const std::vector<int32_t> ids = submitted.sink->ids();
        if (result.ok()) {
          ++finished;
          EXPECT_EQ(ids, expected);
        } else {
          ++cancelled;
          EXPECT_EQ(result.status().code(), absl::StatusCode::kCancelled);
          // What was emitted before is a prefix.
          ASSERT_LE(ids.size(), expected.size());
          EXPECT_THAT(ids, ElementsAreArray(expected.data(), ids.size()));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(finished + cancelled, kThreads * kRequests);
  EXPECT_GT(finished, 100);
  EXPECT_GT(cancelled, 10);
  EXPECT_EQ(Outcomes("length"), finished);
  EXPECT_EQ(Outcomes("cancelled"), cancelled);
  EXPECT_EQ(loop_->load().running, 0);
  EXPECT_THAT(device_->violations(), IsEmpty());
}

}  // namespace
}  // namespace mmfree
