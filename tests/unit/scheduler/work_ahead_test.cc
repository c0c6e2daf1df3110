#include "server/scheduler/work_ahead.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace mmfree {
namespace {

constexpr StepCosts kCosts = {.step = absl::Milliseconds(10),
                              .decode_step = absl::Milliseconds(10),
                              .prompt_token = absl::Microseconds(100),
                              .prompt_budget = 400};
constexpr size_t kNormal = static_cast<size_t>(Priority::kNormal);

double Steps(const WorkByClass& work, int32_t capacity) {
  return absl::FDivDuration(
      EstimateWait(work, Priority::kNormal, 0, capacity, kCosts) - kCosts.step, kCosts.decode_step);
}

TEST(WorkAheadTest, AFreeSlotCostsAStepAndThePromptsAhead) {
  WorkByClass work;
  EXPECT_EQ(EstimateWait(work, Priority::kNormal, 0, 4, kCosts), kCosts.step);
  for (int i = 0; i < 3; ++i) work[kNormal][0].AddRunning(1'000'000, 1);
  EXPECT_EQ(EstimateWait(work, Priority::kNormal, 0, 4, kCosts), kCosts.step);
  work[kNormal][0].prompt_tokens = 4000;
  EXPECT_EQ(EstimateWait(work, Priority::kNormal, 0, 4, kCosts),
            kCosts.step + 4000 * kCosts.prompt_token + 10 * kCosts.decode_step);
}

TEST(WorkAheadTest, LowerClassesAreNotWaitedFor) {
  WorkByClass work;
  for (int i = 0; i < 4; ++i) work[static_cast<size_t>(Priority::kLow)][0].AddRunning(1000, 1);
  EXPECT_EQ(EstimateWait(work, Priority::kNormal, 0, 4, kCosts), kCosts.step);
  EXPECT_GE(EstimateWait(work, Priority::kLow, 0, 4, kCosts), absl::Seconds(9));
  // But higher ones are.
  for (int i = 0; i < 4; ++i) work[static_cast<size_t>(Priority::kHigh)][0].AddWaiting(1000, 0, 1);
  EXPECT_GE(EstimateWait(work, Priority::kNormal, 0, 4, kCosts), absl::Seconds(9));
}

TEST(WorkAheadTest, LongerPromptsOfItsClassAreNotWaitedForAndThoseOfHigherOnesAre) {
  WorkByClass work;
  work[kNormal][3].prompt_tokens = 100'000;
  for (int i = 0; i < 4; ++i) work[kNormal][3].AddWaiting(1000, 0, 1);
  for (int i = 0; i < 4; ++i) work[kNormal][3].AddRunning(1000, 1);
  EXPECT_EQ(EstimateWait(work, Priority::kNormal, 2, 4, kCosts), kCosts.step);
  EXPECT_GE(EstimateWait(work, Priority::kNormal, 3, 4, kCosts), absl::Seconds(12));
  work[static_cast<size_t>(Priority::kHigh)] = work[kNormal];
  EXPECT_GE(EstimateWait(work, Priority::kNormal, 0, 4, kCosts), absl::Seconds(12));
}

TEST(WorkAheadTest, SlotsTakenTogetherAreFreeTogetherAndOthersOneByOne) {
  WorkByClass together;
  WorkByClass spread;
  for (int i = 1; i <= 100; ++i) {
    together[kNormal][0].AddRunning(50, 1);
    spread[kNormal][0].AddRunning(i, 1);
  }
  EXPECT_NEAR(Steps(together, 100), 50, 1);
  EXPECT_LE(Steps(spread, 100), 2);
  for (int i = 0; i < 99; ++i) {
    together[kNormal][0].AddWaiting(50, 0, 1);
    spread[kNormal][0].AddWaiting(100, 0, 1);
  }
  EXPECT_NEAR(Steps(together, 100), 50, 1);
  EXPECT_NEAR(Steps(spread, 100), 100, 2);
}

TEST(WorkAheadTest, OnlyTheShareOfTheOpenStepsThatIsUsedCounts) {
  WorkByClass work;
  work[kNormal][0].AddRunning(1, 1);
  work[kNormal][0].AddWaiting(1000, 900, 1);
  StepCosts costs = kCosts;
  const absl::Duration all = EstimateWait(work, Priority::kNormal, 0, 1, costs);
  costs.used = 0.1;
  EXPECT_EQ(all - EstimateWait(work, Priority::kNormal, 0, 1, costs), 810 * costs.decode_step);
}

// What comes and goes leaves nothing behind, whatever the order.
TEST(WorkAheadTest, SumsReturnToZero) {
  std::mt19937_64 random(1);
  Work work;
  std::vector<int64_t> steps;
  for (int i = 0; i < 5000; ++i) {
    steps.push_back(std::uniform_int_distribution<int64_t>(1, kMaxExpectedSteps)(random));
    work.AddRunning(steps.back(), 1);
    work.AddWaiting(steps.back(), 1, 1);
  }
  std::shuffle(steps.begin(), steps.end(), random);
  for (const int64_t one : steps) {
    work.AddRunning(one, -1);
    work.AddWaiting(one, 1, -1);
  }
  EXPECT_EQ(work.running + work.waiting + work.running_steps + work.waiting_steps + work.open_steps,
            0);
  EXPECT_EQ(work.running_squares, 0);
}

// Slots that are given on as they become free, by hand: the estimate is within a factor of two.
TEST(WorkAheadTest, EstimatesAreThoseOfSlotsGivenOnOneByOne) {
  std::mt19937_64 random(7);
  const auto draw = [&random](int kind) -> int64_t {
    switch (kind) {
      case 0:
        return 40;
      case 1:
        return std::uniform_int_distribution<int64_t>(1, 80)(random);
      default:
        return 1 + static_cast<int64_t>(std::exponential_distribution<double>(1.0 / 40)(random));
    }
  };
  for (int round = 0; round < 300; ++round) {
    const int32_t capacity = std::uniform_int_distribution<int32_t>(1, 64)(random);
    const int kind = round % 3;
    std::vector<int64_t> slots;
    WorkByClass work;
    for (int32_t i = 0; i < capacity; ++i) {
      // At a random moment of its life.
      slots.push_back(std::uniform_int_distribution<int64_t>(1, draw(kind))(random));
      work[kNormal][0].AddRunning(slots.back(), 1);
    }
    const int64_t waiting = std::uniform_int_distribution<int64_t>(0, 4 * capacity)(random);
    for (int64_t i = 0; i < waiting; ++i) {
      const int64_t steps = draw(kind);
      work[kNormal][0].AddWaiting(steps, 0, 1);
      *std::min_element(slots.begin(), slots.end()) += steps;
    }
    const double real = static_cast<double>(*std::min_element(slots.begin(), slots.end()));
    EXPECT_LE(Steps(work, capacity), 2 * real + 10) << kind << ' ' << capacity << ' ' << waiting;
    EXPECT_GE(Steps(work, capacity), real / 2 - 10) << kind << ' ' << capacity << ' ' << waiting;
  }
}

}  // namespace
}  // namespace mmfree
