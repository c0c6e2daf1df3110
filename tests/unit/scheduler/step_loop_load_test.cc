// The step loop under more load than it has slots, tokens or time for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "server/scheduler/step_loop.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

using StepLoopLoadTest = StepLoopFixture;

TEST_F(StepLoopLoadTest, PreemptedRequestsGetTheBytesTheyWouldGetAlone) {
  device_options_.num_slots = 3;
  options_.policy.age = absl::Milliseconds(20);
  Start();
  std::mt19937_64 random(5);
  struct Sent {
    GenerationRequest request;
    std::shared_ptr<CollectingSink> sink;
  };
  std::vector<Sent> sent;
  device_->CloseGate();
  // So that there is always a step to wait for.
  GenerationRequest endless = Generation(Prompt(3), 1'000'000);
  endless.priority = Priority::kLow;
  const RequestHandle background = MustSubmit(endless, std::make_shared<CollectingSink>());
  for (int i = 0; i < 300; ++i) {
    GenerationRequest request = Generation(Prompt(1 + static_cast<int>(random() % 60), i),
                                           1 + static_cast<int>(random() % 30));
    request.priority = static_cast<Priority>(random() % 3);
    request.caller = std::string(1, static_cast<char>('a' + random() % 3));
    request.sampling.temperature = 1.0f;
    request.sampling.seed = random();
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(request, sink);
    sent.push_back({request, sink});
    for (uint64_t step = random() % 16; step > 0; --step) {
      device_->WaitUntilHeldUp();
      device_->ReleaseSteps(1);
    }
  }
  device_->OpenGate();
  loop_->Cancel(background);
  for (const Sent& one : sent) {
    ASSERT_TRUE(one.sink->WaitForEnd().ok()) << one.sink->WaitForEnd().status();
    EXPECT_THAT(one.sink->ids(),
                ElementsAreArray(ExpectedIds(one.request.prompt,
                                             static_cast<int>(one.request.max_new_tokens),
                                             one.request.sampling)));
  }
  EXPECT_GT(Metric("mmfree_num_preemptions_total"), 10);
}

TEST_F(StepLoopLoadTest, AThousandClientsThatNeverReadHoldUpNobodyAndAreGivenUp) {
  device_options_.num_slots = 8;
  options_.max_queue = 2000;
  options_.max_stream_backlog = 16;
  options_.stalled_reader_timeout = absl::Minutes(10);
  Start();
  std::vector<std::shared_ptr<CollectingSink>> idle;
  for (int i = 0; i < 1000; ++i) {
    idle.push_back(std::make_shared<CollectingSink>(CollectingSink::Reader::kIdle));
    MustSubmit(Generation(Prompt(3, i), 1'000'000), idle.back());
  }
  for (int i = 0; i < 20; ++i) {
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(Generation(Prompt(20, i), 100), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(Prompt(20, i), 100)));
  }
  // All of them have come to their limit, or will.
  for (const auto& sink : idle) sink->WaitForTokens(16);
  for (const auto& sink : idle) EXPECT_LE(sink->tokens().size(), 32u);
  clock_.Advance(absl::Minutes(11));
  for (const auto& sink : idle) {
    const absl::Status status = sink->WaitForEnd().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
    EXPECT_THAT(std::string(status.message()), HasSubstr("read nothing"));
  }
}

TEST_F(StepLoopLoadTest, ASlowReaderThatReadsIsNotGivenUp) {
  options_.max_stream_backlog = 16;
  options_.stalled_reader_timeout = absl::Seconds(10);
  Start();
  auto slow = std::make_shared<CollectingSink>(CollectingSink::Reader::kIdle);
  MustSubmit(Generation(Prompt(3), 40), slow);
  slow->WaitForTokens(17);
  for (int i = 0; i < 6; ++i) {
    while (Metric("mmfree_num_requests_paused") == 0) {
    }
    clock_.Advance(absl::Seconds(6));
    slow->Read(1);
    // Time for the step thread to see it: another request runs through.
    auto other = std::make_shared<CollectingSink>();
    MustSubmit(Generation(Prompt(1), 2), other);
    ASSERT_TRUE(other->WaitForEnd().ok());
  }
  slow->StartReading();
  ASSERT_TRUE(slow->WaitForEnd().ok()) << slow->WaitForEnd().status();
  EXPECT_THAT(slow->ids(), ElementsAreArray(ExpectedIds(Prompt(3), 40)));
}

TEST_F(StepLoopLoadTest, WhatCannotMeetItsDeadlineIsRefusedAtOnce) {
  device_options_.num_slots = 1;
  Start();
  // Measured: a millisecond a step.
  auto first = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(100), 100), first);
  ASSERT_TRUE(first->WaitForEnd().ok());
  device_->CloseGate();
  auto running = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(1), 50), running);
  device_->WaitUntilHeldUp();
  const auto submit = [&](absl::Duration time, Priority priority = Priority::kNormal) {
    GenerationRequest request = Generation(Prompt(8), 1000);
    request.deadline = clock_.Now() + time;
    request.priority = priority;
    return loop_->Submit(request, std::make_shared<CollectingSink>()).status();
  };
  // Nothing ends it early, so it takes a thousand steps.
  const absl::Status refused = submit(absl::Milliseconds(500));
  EXPECT_EQ(refused.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("cannot be met"));
  EXPECT_TRUE(submit(absl::Seconds(10)).ok());
  device_->OpenGate();
}

// Who cancels a long stream and comes back at once must not be refused for it.
TEST_F(StepLoopLoadTest, DeadlinesAreRefusedForTheQueueAndNotForWhatRuns) {
  device_options_.num_slots = 1;
  Start();
  auto first = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(100), 100), first);
  ASSERT_TRUE(first->WaitForEnd().ok());
  device_->CloseGate();
  std::vector<RequestHandle> handles = {
      MustSubmit(Generation(Prompt(1), 1'000'000), std::make_shared<CollectingSink>())};
  device_->WaitUntilHeldUp();
  device_->ReleaseSteps(1);
  device_->WaitUntilHeldUp();
  GenerationRequest request = Generation(Prompt(1), 5);
  request.deadline = clock_.Now() + absl::Seconds(1);
  handles.push_back(MustSubmit(request, std::make_shared<CollectingSink>()));
  // Five seconds of others before it.
  for (int i = 0; i < 100; ++i) {
    handles.push_back(MustSubmit(Generation(Prompt(1, i), 50), std::make_shared<CollectingSink>()));
  }
  EXPECT_EQ(loop_->Submit(request, std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  for (const RequestHandle handle : handles) loop_->Cancel(handle);
  device_->OpenGate();
}

TEST_F(StepLoopLoadTest, AFloodOfLongPromptsDoesNotSlowStreamsBeyondTheTarget) {
  device_options_.num_slots = 16;
  device_options_.step_time = absl::Milliseconds(1);
  device_options_.token_time = absl::Microseconds(100);
  options_.policy.prefill_chunk = 256;
  options_.policy.step_token_budget = 1024;
  options_.step_time_target = absl::Milliseconds(10);
  options_.max_stream_backlog = 1000;  // the stream never pauses
  Start();
  // The cost of both kinds of steps is known.
  for (int i = 0; i < 2; ++i) {
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(Generation(Prompt(2000, i), 200), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
  }
  device_->CloseGate();
  auto stream = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(1), 300), stream);
  device_->WaitUntilHeldUp();
  std::vector<RequestHandle> flood;
  for (int i = 0; i < 12; ++i) {
    flood.push_back(
        MustSubmit(Generation(Prompt(16'384, i), 1), std::make_shared<CollectingSink>()));
  }
  const int64_t before = device_->num_steps();
  device_->OpenGate();
  ASSERT_TRUE(stream->WaitForEnd().ok());
  for (const RequestHandle handle : flood) loop_->Cancel(handle);
  std::vector<int> tokens;
  const auto steps = device_->steps();
  for (size_t i = static_cast<size_t>(before) + 1; i < static_cast<size_t>(before) + 299; ++i) {
    int sum = 0;
    for (const FakeDevice::Row& row : steps[i]) sum += row.tokens;
    tokens.push_back(sum);
  }
  std::sort(tokens.begin(), tokens.end());
  const absl::Duration p99 =
      absl::Milliseconds(1) + absl::Microseconds(100) * tokens[tokens.size() * 99 / 100];
  EXPECT_LE(p99, 2 * options_.step_time_target);
  // And the prompts get what the target leaves.
  EXPECT_GE(tokens[tokens.size() / 2], 50);
}

}  // namespace
}  // namespace mmfree
