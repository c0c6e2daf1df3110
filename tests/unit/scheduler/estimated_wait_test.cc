// The estimated wait against the wait that follows, on a virtual clock.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "server/scheduler/retry_after.h"
#include "server/scheduler/step_loop.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

class StopAfter final : public StopCondition {
 public:
  explicit StopAfter(int64_t tokens) : tokens_(tokens) {}
  bool Append(int32_t) override { return --tokens_ <= 0; }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<StopAfter>(tokens_);
  }

 private:
  int64_t tokens_;
};

struct Burst {
  const char* name;
  int32_t slots;
  absl::Duration step_time;
  absl::Duration token_time;
  int requests;
  int max_prompt;
  int max_new;
  bool ends_early = false;  // at a quarter of what it may emit, on average
};

class EstimatedWaitTest : public StepLoopFixture, public ::testing::WithParamInterface<Burst> {
 protected:
  absl::Duration Estimate(Priority priority) const {
    return loop_->load().estimated_wait[static_cast<size_t>(priority)];
  }
};

// A burst comes to a server that has seen a few lone requests. From a second on, and at any later
// moment, what a request is told is what it gets, to a factor of two and two steps.
TEST_P(EstimatedWaitTest, IsTheWaitThatFollowsToAFactorOfTwo) {
  const Burst& burst = GetParam();
  device_options_.num_slots = burst.slots;
  device_options_.step_time = burst.step_time;
  device_options_.token_time = burst.token_time;
  options_.policy.prefill_chunk = 64;
  options_.policy.step_token_budget = 256;
  options_.policy.age = absl::Hours(1);
  options_.max_queue = 10'000;
  options_.max_stream_backlog = 100'000;
  Start();
  for (int i = 0; i < 5; ++i) {
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(Generation(Prompt(5, i), 10), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
  }
  device_->CloseGate();
  std::mt19937_64 random(11);
  const auto uniform = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::vector<RequestHandle> handles;
  const auto submit = [&] {
    GenerationRequest request = Generation(Prompt(static_cast<int>(uniform(1, burst.max_prompt))),
                                           uniform(1, burst.max_new));
    if (burst.ends_early) {
      request.stop_condition =
          std::make_shared<StopAfter>(uniform(1, (request.max_new_tokens + 1) / 2));
    }
    request.sampling.temperature = 1;
    handles.push_back(MustSubmit(request, std::make_shared<CollectingSink>()));
  };
  const absl::Time begin = clock_.Now();
  for (int i = 0; i < burst.requests; ++i) submit();

  struct Probe {
    absl::Duration at;
    absl::Duration estimate;
    absl::Duration step;
    std::shared_ptr<CollectingSink> sink;
  };
  std::vector<Probe> probes;
  device_->WaitUntilHeldUp();
  for (absl::Duration at = absl::Seconds(1); probes.size() < 12; at += absl::Milliseconds(700)) {
    while (clock_.Now() - begin < at) {
      device_->ReleaseSteps(1);
      device_->WaitUntilHeldUp();
    }
    auto sink = std::make_shared<CollectingSink>();
    probes.push_back(
        {clock_.Now() - begin, Estimate(Priority::kNormal), loop_->load().step_time, sink});
    MustSubmit(Generation(Prompt(1), 1), sink);
    // So that there is always something to do.
    for (int i = 0; i < burst.requests / 10; ++i) submit();
  }
  device_->OpenGate();
  for (const Probe& probe : probes) {
    const absl::StatusOr<GenerationResult>& result = probe.sink->WaitForEnd();
    ASSERT_TRUE(result.ok()) << result.status();
    const absl::Duration waited = result->timings.queued;
    EXPECT_LE(probe.estimate, 2 * waited + 2 * probe.step) << "after " << probe.at;
    EXPECT_GE(probe.estimate, waited / 2 - 2 * probe.step) << "after " << probe.at;
  }
  for (const RequestHandle handle : handles) loop_->Cancel(handle);
}

INSTANTIATE_TEST_SUITE_P(
    Bursts, EstimatedWaitTest,
    ::testing::Values(
        Burst{"Streams", 8, absl::Milliseconds(10), absl::Milliseconds(1), 100, 10, 60},
        Burst{"OneSlot", 1, absl::Milliseconds(5), absl::ZeroDuration(), 50, 20, 40},
        Burst{"ManySlots", 64, absl::Milliseconds(2), absl::Microseconds(300), 500, 10, 80},
        Burst{"LongPrompts", 16, absl::Milliseconds(2), absl::Microseconds(100), 100, 2000, 20},
        Burst{"OnlyPrompts", 16, absl::Milliseconds(2), absl::Microseconds(100), 400, 200, 1},
        Burst{"TinyPrompts", 4, absl::Milliseconds(20), absl::ZeroDuration(), 200, 1, 10},
        Burst{"EndEarly", 8, absl::Milliseconds(10), absl::Microseconds(500), 100, 10, 200, true},
        Burst{"LongStreams", 4, absl::Milliseconds(1), absl::ZeroDuration(), 12, 10, 8000}),
    [](const ::testing::TestParamInfo<Burst>& info) { return info.param.name; });

TEST_F(EstimatedWaitTest, ARefusalTellsTheWaitOfItsOwnClass) {
  device_options_.num_slots = 2;
  device_options_.step_time = absl::Milliseconds(10);
  options_.max_queue = 4;
  Start();
  auto first = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(8), 50), first);
  ASSERT_TRUE(first->WaitForEnd().ok());
  device_->CloseGate();
  std::vector<RequestHandle> handles;
  for (const Priority priority : {Priority::kLow, Priority::kLow, Priority::kNormal,
                                  Priority::kNormal, Priority::kNormal, Priority::kHigh}) {
    GenerationRequest request = Generation(Prompt(1), 1000);
    request.priority = priority;
    handles.push_back(MustSubmit(request, std::make_shared<CollectingSink>()));
  }
  std::vector<absl::Duration> delays;
  for (const Priority priority : {Priority::kLow, Priority::kNormal, Priority::kHigh}) {
    GenerationRequest request = Generation(Prompt(1), 1);
    request.priority = priority;
    absl::Status refusal = loop_->Submit(request, std::make_shared<CollectingSink>()).status();
    EXPECT_EQ(refusal.code(), absl::StatusCode::kResourceExhausted);
    delays.push_back(TakeRetryAfter(&refusal).value_or(absl::InfiniteDuration()));
    EXPECT_EQ(delays.back(), Estimate(priority));
  }
  // One of high priority takes a slot from the others at once.
  EXPECT_LE(delays[2], absl::Milliseconds(30));
  EXPECT_GE(delays[1], absl::Seconds(10));
  EXPECT_GT(delays[0], delays[1]);
  EXPECT_LT(delays[0], absl::Minutes(2));
  for (const RequestHandle handle : handles) loop_->Cancel(handle);
}

TEST_F(EstimatedWaitTest, StreamsThatNobodyReadsAreNotWaitedFor) {
  device_options_.num_slots = 2;
  options_.max_stream_backlog = 8;
  Start();
  std::vector<std::shared_ptr<CollectingSink>> idle;
  for (int i = 0; i < 10; ++i) {
    idle.push_back(std::make_shared<CollectingSink>(CollectingSink::Reader::kIdle));
    MustSubmit(Generation(Prompt(3, i), 1'000'000), idle.back());
  }
  for (const auto& sink : idle) sink->WaitForTokens(9);
  // The last of them is paused within the step that gave it its ninth token.
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(3), 20), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  EXPECT_LE(Estimate(Priority::kNormal), absl::Milliseconds(10));
  // Those that are read again are.
  device_->CloseGate();
  for (const auto& one : idle) one->StartReading();
  device_->WaitUntilHeldUp();
  device_->ReleaseSteps(1);
  device_->WaitUntilHeldUp();
  EXPECT_EQ(Metric("mmfree_num_requests_paused"), 0);
  EXPECT_GE(Estimate(Priority::kNormal), absl::Seconds(10));
}

}  // namespace
}  // namespace mmfree
