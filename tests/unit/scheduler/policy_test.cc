#include "server/scheduler/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

class PolicyTest : public ::testing::Test {
 protected:
  SchedulerEntry* Add(Policy* policy, int64_t prompt_tokens,
                      absl::Time deadline = absl::InfiniteFuture(),
                      Priority priority = Priority::kNormal) {
    entries_.push_back(std::make_unique<SchedulerEntry>());
    SchedulerEntry* const entry = entries_.back().get();
    entry->id = entries_.size();
    entry->prompt_tokens = prompt_tokens;
    entry->deadline = deadline;
    entry->priority = priority;
    policy->Enqueue(entry, now_);
    return entry;
  }

  // Plans a step, completes it and returns its rows as (id, tokens).
  std::vector<std::pair<uint64_t, int32_t>> Step(Policy* policy) {
    policy->PlanStep(now_, prompt_budget_, &plan_);
    policy->CompleteStep(plan_);
    std::vector<std::pair<uint64_t, int32_t>> rows;
    for (const Policy::Row& row : plan_.rows) rows.emplace_back(row.entry->id, row.tokens);
    return rows;
  }

  SchedulerEntry* AddOf(Policy* policy, Priority priority, int64_t prompt_tokens = 1) {
    return Add(policy, prompt_tokens, absl::InfiniteFuture(), priority);
  }

  absl::Time now_ = absl::FromUnixSeconds(1000);
  int64_t prompt_budget_ = 1 << 20;
  std::vector<std::unique_ptr<SchedulerEntry>> entries_;
  Policy::Plan plan_;
};

using Rows = std::vector<std::pair<uint64_t, int32_t>>;

TEST_F(PolicyTest, APromptIsFedInChunksAndThenDecodes) {
  Policy policy({.num_slots = 1, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const entry = Add(&policy, 10);
  EXPECT_EQ(Step(&policy), (Rows{{1, 4}}));
  EXPECT_EQ(Step(&policy), (Rows{{1, 4}}));
  EXPECT_EQ(entry->phase, Phase::kPrefill);
  EXPECT_EQ(Step(&policy), (Rows{{1, 2}}));
  EXPECT_EQ(entry->phase, Phase::kDecode);
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}}));
  EXPECT_EQ(plan_.decode_rows, 1);
}

TEST_F(PolicyTest, DecodingRowsComeFirstAndPromptsShareTheRestInOrderOfAdmission) {
  Policy policy({.num_slots = 8, .prefill_chunk = 6, .step_token_budget = 10});
  Add(&policy, 1);
  Add(&policy, 1);
  Step(&policy);
  Add(&policy, 100);
  Add(&policy, 100);
  Add(&policy, 100);
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}, {2, 1}, {3, 6}, {4, 2}}));
  EXPECT_THAT(plan_.admitted, SizeIs(2));
  EXPECT_EQ(plan_.tokens, 10);
  // The fifth has neither a row nor a slot while there is no budget for it.
  EXPECT_EQ(policy.waiting(), 1u);
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}, {2, 1}, {3, 6}, {4, 2}}));
}

TEST_F(PolicyTest, AShortPromptOvertakesLongOnesThatHoldNoSlotsMeanwhile) {
  Policy policy({.num_slots = 4, .prefill_chunk = 4, .step_token_budget = 8});
  for (int i = 0; i < 6; ++i) Add(&policy, 1000);
  EXPECT_EQ(Step(&policy), (Rows{{1, 4}, {2, 4}}));
  EXPECT_EQ(Step(&policy), (Rows{{1, 4}, {2, 4}}));
  EXPECT_EQ(policy.running(), 2u);
  Add(&policy, 3);
  EXPECT_EQ(Step(&policy), (Rows{{7, 3}, {1, 4}, {2, 1}}));
  EXPECT_EQ(Step(&policy), (Rows{{7, 1}, {1, 4}, {2, 3}}));
}

TEST_F(PolicyTest, ABoundarySetWhileTheStepIsPlannedStillCuts) {
  SchedulerEntry* first = nullptr;
  Policy policy({.num_slots = 2, .prefill_chunk = 8, .step_token_budget = 100},
                [&first](SchedulerEntry* entry) {
                  if (first == nullptr) {
                    first = entry;
                    return;
                  }
                  entry->held = true;
                  first->chunk_boundary = 5;
                });
  Add(&policy, 30);
  SchedulerEntry* const second = Add(&policy, 30);
  EXPECT_EQ(Step(&policy), (Rows{{1, 5}}));
  EXPECT_EQ(plan_.tokens, 5);
  first->chunk_boundary = 0;
  second->fed = 5;
  policy.Unhold(second);
  EXPECT_EQ(Step(&policy), (Rows{{1, 8}, {2, 8}}));
}

TEST_F(PolicyTest, AChunkEndsAtTheBoundaryItsOwnerMovesOn) {
  Policy policy({.num_slots = 1, .prefill_chunk = 8, .step_token_budget = 100});
  SchedulerEntry* const entry = Add(&policy, 30);
  entry->chunk_boundary = 5;
  EXPECT_EQ(Step(&policy), (Rows{{1, 5}}));
  entry->chunk_boundary = 16;
  EXPECT_EQ(Step(&policy), (Rows{{1, 8}}));
  EXPECT_EQ(Step(&policy), (Rows{{1, 3}}));
  EXPECT_EQ(Step(&policy), (Rows{{1, 8}}));  // a boundary that is passed does not bind
  EXPECT_EQ(Step(&policy), (Rows{{1, 6}}));
}

TEST_F(PolicyTest, WhatIsRestoredWhenTheSlotIsGivenIsNotFedAgain) {
  int prepared = 0;
  Policy policy({.num_slots = 1, .prefill_chunk = 8, .step_token_budget = 100},
                [&prepared](SchedulerEntry* entry) {
                  ++prepared;
                  EXPECT_GE(entry->slot, 0);
                  entry->fed = 17;
                  entry->chunk_boundary = 18;
                });
  SchedulerEntry* const entry = Add(&policy, 20);
  Add(&policy, 20);
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}}));
  EXPECT_EQ(Step(&policy), (Rows{{1, 2}}));
  EXPECT_EQ(entry->phase, Phase::kDecode);
  EXPECT_EQ(prepared, 1) << "of the entry that waits nothing is known yet";
}

TEST_F(PolicyTest, AFreedSlotGoesToTheOldestThatWaits) {
  Policy policy({.num_slots = 2, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const first = Add(&policy, 1);
  Add(&policy, 1);
  SchedulerEntry* const third = Add(&policy, 1);
  SchedulerEntry* const fourth = Add(&policy, 1);
  Step(&policy);
  EXPECT_EQ(third->phase, Phase::kWaiting);
  const int32_t slot = first->slot;
  policy.Remove(first);
  Step(&policy);
  EXPECT_EQ(third->slot, slot);
  EXPECT_EQ(fourth->phase, Phase::kWaiting);
  EXPECT_EQ(first->phase, Phase::kNone);
  EXPECT_EQ(first->slot, -1);
}

TEST_F(PolicyTest, APausedEntryKeepsItsSlotAndSkipsSteps) {
  Policy policy({.num_slots = 2, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const first = Add(&policy, 1);
  Add(&policy, 1);
  Step(&policy);
  policy.Pause(first);
  const int32_t slot = first->slot;
  EXPECT_EQ(Step(&policy), (Rows{{2, 1}}));
  EXPECT_THAT(policy.paused(), ElementsAre(first));
  policy.Resume(first);
  EXPECT_EQ(first->slot, slot);
  EXPECT_THAT(Step(&policy), UnorderedElementsAre(std::pair(1u, 1), std::pair(2u, 1)));
}

TEST_F(PolicyTest, APausedEntryGivesItsSlotToOneThatWaitsAndComesBackWhenItIsRead) {
  Policy policy({.num_slots = 1, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const paused = AddOf(&policy, Priority::kHigh);
  Step(&policy);
  policy.Pause(paused);
  SchedulerEntry* const low = AddOf(&policy, Priority::kLow);
  EXPECT_EQ(Step(&policy), (Rows{{2, 1}}));
  ASSERT_THAT(plan_.preempted, SizeIs(1));
  EXPECT_EQ(plan_.preempted[0].entry, paused);
  EXPECT_EQ(plan_.preempted[0].slot, low->slot);
  EXPECT_EQ(paused->phase, Phase::kParked);
  EXPECT_THAT(policy.parked(), ElementsAre(paused));
  EXPECT_EQ(Step(&policy), (Rows{{2, 1}}));
  policy.Resume(paused);
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}}));
  EXPECT_THAT(plan_.resumed, ElementsAre(paused));
  EXPECT_EQ(low->phase, Phase::kPreempted);
}

TEST_F(PolicyTest, AHigherClassTakesASlotOfTheLowestAndItGoesOnWhereItWas) {
  Policy policy({.num_slots = 2, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const low = AddOf(&policy, Priority::kLow, 10);
  SchedulerEntry* const normal = AddOf(&policy, Priority::kNormal);
  Step(&policy);
  ASSERT_EQ(low->fed, 4);
  SchedulerEntry* const high = AddOf(&policy, Priority::kHigh);
  Step(&policy);
  EXPECT_EQ(low->phase, Phase::kPreempted);
  EXPECT_EQ(low->slot, -1);
  EXPECT_EQ(normal->phase, Phase::kDecode);
  EXPECT_EQ(high->phase, Phase::kDecode);
  EXPECT_EQ(policy.running(), 2u);
  Step(&policy);
  EXPECT_THAT(plan_.resumed, IsEmpty());
  policy.Remove(high);
  EXPECT_EQ(Step(&policy), (Rows{{2, 1}, {1, 4}}));
  EXPECT_THAT(plan_.resumed, ElementsAre(low));
  EXPECT_THAT(plan_.admitted, IsEmpty());
  EXPECT_EQ(low->fed, 8);
}

TEST_F(PolicyTest, EqualsAreNeverPreempted) {
  for (const Priority priority : {Priority::kLow, Priority::kNormal, Priority::kHigh}) {
    Policy policy({.num_slots = 1, .prefill_chunk = 4, .step_token_budget = 100});
    SchedulerEntry* const first = AddOf(&policy, priority);
    Step(&policy);
    AddOf(&policy, priority);
    for (int i = 0; i < 40; ++i) Step(&policy);
    EXPECT_EQ(first->phase, Phase::kDecode);
  }
}

TEST_F(PolicyTest, ASlotIsTakenOnlyWhenTheStepHasTokensForItsNewHolder) {
  Policy policy({.num_slots = 8, .max_batch = 8, .prefill_chunk = 4, .step_token_budget = 16});
  for (int i = 0; i < 8; ++i) AddOf(&policy, Priority::kLow);
  Step(&policy);
  for (int i = 0; i < 8; ++i) AddOf(&policy, Priority::kHigh, 1000);
  // Eight rows leave eight tokens, and one more with each slot that is taken from them.
  EXPECT_THAT(Step(&policy),
              UnorderedElementsAre(std::pair(1u, 1), std::pair(2u, 1), std::pair(3u, 1),
                                   std::pair(4u, 1), std::pair(5u, 1), std::pair(9u, 4),
                                   std::pair(10u, 4), std::pair(11u, 3)));
  EXPECT_THAT(plan_.preempted, SizeIs(3));
  EXPECT_THAT(plan_.admitted, SizeIs(3));
  for (int i = 0; i < 10; ++i) {
    Step(&policy);
    EXPECT_EQ(policy.running(), 8u) << "a slot was taken and not used";
  }
}

TEST_F(PolicyTest, PromptsOfAHigherClassAreFedFirstButNotAlone) {
  Policy policy({.num_slots = 4, .prefill_chunk = 8, .step_token_budget = 8});
  SchedulerEntry* const low = AddOf(&policy, Priority::kLow, 1000);
  Step(&policy);
  AddOf(&policy, Priority::kHigh, 1000);
  const int64_t before = low->fed;
  int steps_of_low = 0;
  for (int i = 0; i < 2 * Policy::kAgedStep; ++i) {
    for (const auto& [id, tokens] : Step(&policy)) steps_of_low += id == low->id ? 1 : 0;
  }
  EXPECT_EQ(steps_of_low, 2);
  EXPECT_EQ(low->fed, before + 16);
}

TEST_F(PolicyTest, OneThatHasWaitedForLongGetsItsTurnAndKeepsItsSlot) {
  Policy policy({.num_slots = 1,
                 .prefill_chunk = 8,
                 .step_token_budget = 8,
                 .age = absl::Seconds(5),
                 .aged_turn = 4});
  SchedulerEntry* running = AddOf(&policy, Priority::kHigh);
  Step(&policy);
  SchedulerEntry* const low = AddOf(&policy, Priority::kLow);
  // Each time the slot is free another of the highest class waits.
  const auto next = [&] {
    AddOf(&policy, Priority::kHigh);
    policy.Remove(running);
    Step(&policy);
    running = plan_.admitted.empty() ? nullptr : plan_.admitted[0];
  };
  for (int i = 0; i < 20; ++i) next();
  EXPECT_EQ(low->phase, Phase::kWaiting) << "it is not old yet";
  now_ += absl::Seconds(5);
  for (int i = 0; i < 4 && low->phase == Phase::kWaiting; ++i) next();
  EXPECT_EQ(low->phase, Phase::kDecode);
  for (int i = 0; i < 20; ++i) Step(&policy);
  EXPECT_EQ(low->phase, Phase::kDecode) << "those that wait took its slot";
}

TEST_F(PolicyTest, ALongPromptGivesItsSlotToAShortOneUnlessItGotItForItsAge) {
  for (const bool aged : {false, true}) {
    Policy policy({.num_slots = 1,
                   .prefill_chunk = 8,
                   .step_token_budget = 8,
                   .age = aged ? absl::ZeroDuration() : absl::Hours(1),
                   .aged_turn = 1});
    SchedulerEntry* const longest = AddOf(&policy, aged ? Priority::kLow : Priority::kHigh, 1000);
    Step(&policy);
    SchedulerEntry* const brief = AddOf(&policy, Priority::kHigh, 8);
    SchedulerEntry* const as_long = AddOf(&policy, Priority::kHigh, 1000);
    Step(&policy);
    EXPECT_EQ(longest->phase, aged ? Phase::kPrefill : Phase::kPreempted);
    EXPECT_EQ(brief->phase, aged ? Phase::kWaiting : Phase::kDecode);
    if (!aged) policy.Remove(brief);
    for (int i = 0; i < 20; ++i) Step(&policy);
    EXPECT_EQ(longest->phase, Phase::kPrefill);
    EXPECT_EQ(longest->fed, aged ? 176 : 168);
    EXPECT_EQ(as_long->phase, Phase::kWaiting);
  }
}

TEST_F(PolicyTest, PromptsBesideDecodingRowsKeepToTheirBudget) {
  Policy policy({.num_slots = 4, .prefill_chunk = 50, .step_token_budget = 100});
  Add(&policy, 1);
  Step(&policy);
  Add(&policy, 1000);
  prompt_budget_ = 7;
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}, {2, 7}}));
  prompt_budget_ = 0;  // a prompt always gets on
  EXPECT_EQ(Step(&policy), (Rows{{1, 1}, {2, 1}}));
}

TEST_F(PolicyTest, EntriesAreRemovedFromEveryPhase) {
  Policy policy({.num_slots = 3, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const decoding = Add(&policy, 1);
  SchedulerEntry* const paused = Add(&policy, 1);
  SchedulerEntry* const prefilling = Add(&policy, 100);
  SchedulerEntry* const waiting = Add(&policy, 100);
  Step(&policy);
  policy.Pause(paused);
  ASSERT_EQ(decoding->phase, Phase::kDecode);
  ASSERT_EQ(prefilling->phase, Phase::kPrefill);
  ASSERT_EQ(waiting->phase, Phase::kWaiting);
  for (SchedulerEntry* entry : {decoding, paused, prefilling, waiting}) policy.Remove(entry);
  EXPECT_TRUE(policy.empty());
  EXPECT_THAT(Step(&policy), IsEmpty());
  // Every slot is free again.
  for (int i = 0; i < 3; ++i) Add(&policy, 1);
  EXPECT_THAT(Step(&policy), SizeIs(3));
}

TEST_F(PolicyTest, DeadlinesExpireInEveryPhaseAndNotBefore) {
  const absl::Time start = absl::FromUnixSeconds(100);
  Policy policy({.num_slots = 3, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const decoding = Add(&policy, 1, start + absl::Seconds(3));
  SchedulerEntry* const paused = Add(&policy, 1, start + absl::Seconds(2));
  SchedulerEntry* const prefilling = Add(&policy, 100, start + absl::Seconds(1));
  SchedulerEntry* const waiting = Add(&policy, 100, start + absl::Seconds(2));
  Add(&policy, 100);
  Step(&policy);
  policy.Pause(paused);
  const auto expired = [&](absl::Duration after) {
    std::vector<SchedulerEntry*> entries;
    policy.CollectExpired(start + after, &entries);
    return entries;
  };
  EXPECT_THAT(expired(absl::Milliseconds(999)), IsEmpty());
  EXPECT_THAT(expired(absl::Seconds(1)), ElementsAre(prefilling));
  EXPECT_THAT(expired(absl::Seconds(2)), ElementsAre(prefilling, paused, waiting));
  EXPECT_THAT(expired(absl::Hours(1)), ElementsAre(prefilling, paused, waiting, decoding));
  policy.Remove(paused);
  EXPECT_THAT(expired(absl::Hours(1)), ElementsAre(prefilling, waiting, decoding));
}

TEST(PolicyCapacityTest, SlotsBatchAndBudgetBoundIt) {
  const auto capacity = [](int32_t slots, int32_t max_batch, int32_t chunk, int32_t budget) {
    return Policy::Capacity({.num_slots = slots,
                             .max_batch = max_batch,
                             .prefill_chunk = chunk,
                             .step_token_budget = budget});
  };
  EXPECT_EQ(capacity(16, 0, 256, 1024), 16);
  EXPECT_EQ(capacity(16, 4, 256, 1024), 4);
  EXPECT_EQ(capacity(5000, 0, 256, 1024), 768);      // a chunk is kept for prompts
  EXPECT_EQ(capacity(5000, 0, 512, 1024), 768);      // a quarter at most
  EXPECT_EQ(capacity(5000, 1000, 256, 1024), 1000);  // asked for: taken at its word
  EXPECT_EQ(capacity(5000, 2000, 256, 1024), 1024);
  EXPECT_EQ(capacity(16, 0, 256, 1), 1);
}

}  // namespace
}  // namespace mmfree
