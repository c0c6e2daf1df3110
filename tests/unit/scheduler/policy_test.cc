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
                      absl::Time deadline = absl::InfiniteFuture()) {
    entries_.push_back(std::make_unique<SchedulerEntry>());
    SchedulerEntry* const entry = entries_.back().get();
    entry->id = entries_.size();
    entry->prompt_tokens = prompt_tokens;
    entry->deadline = deadline;
    policy->Enqueue(entry);
    return entry;
  }

  // Plans a step, completes it and returns its rows as (id, tokens).
  std::vector<std::pair<uint64_t, int32_t>> Step(Policy* policy) {
    policy->PlanStep(&plan_);
    policy->CompleteStep(plan_);
    std::vector<std::pair<uint64_t, int32_t>> rows;
    for (const Policy::Row& row : plan_.rows) rows.emplace_back(row.entry->id, row.tokens);
    return rows;
  }

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
  Add(&policy, 1);
  Step(&policy);
  policy.Pause(first);
  const int32_t slot = first->slot;
  EXPECT_EQ(Step(&policy), (Rows{{2, 1}}));
  EXPECT_THAT(policy.paused(), ElementsAre(first));
  EXPECT_EQ(policy.waiting(), 1u);
  policy.Resume(first);
  EXPECT_EQ(first->slot, slot);
  Step(&policy);
  EXPECT_THAT(Rows({{plan_.rows[0].entry->id, 1}, {plan_.rows[1].entry->id, 1}}),
              UnorderedElementsAre(std::pair(1u, 1), std::pair(2u, 1)));
}

TEST_F(PolicyTest, EntriesAreRemovedFromEveryPhase) {
  Policy policy({.num_slots = 3, .prefill_chunk = 4, .step_token_budget = 100});
  SchedulerEntry* const decoding = Add(&policy, 1);
  SchedulerEntry* const paused = Add(&policy, 1);
  SchedulerEntry* const prefilling = Add(&policy, 100);
  SchedulerEntry* const waiting = Add(&policy, 1);
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
  SchedulerEntry* const waiting = Add(&policy, 1, start + absl::Seconds(2));
  Add(&policy, 1);
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

TEST(AdmissionControlTest, RequestsBeyondTheQueueAreRefusedAndAFreeSlotCounts) {
  AdmissionControl admission({.capacity = 2, .max_queue = 1, .max_queue_tokens = 1000});
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(admission.Admit(1).ok());
  EXPECT_EQ(admission.Admit(1).code(), absl::StatusCode::kResourceExhausted);
  // Getting a slot does not make room, ending does.
  admission.Started(2, 2);
  EXPECT_EQ(admission.Admit(1).code(), absl::StatusCode::kResourceExhausted);
  admission.EndedRunning(1);
  EXPECT_TRUE(admission.Admit(1).ok());
  admission.EndedWaiting(1, 1);
  EXPECT_TRUE(admission.Admit(1).ok());
  EXPECT_EQ(admission.departures_before_next(), 2);
  admission.EndedWaiting(2, 2);
  EXPECT_EQ(admission.departures_before_next(), 0);
  admission.EndedRunning(1);
  EXPECT_TRUE(admission.empty());
}

TEST(AdmissionControlTest, PromptTokensThatWaitAreBounded) {
  AdmissionControl admission({.capacity = 2, .max_queue = 100, .max_queue_tokens = 1000});
  EXPECT_TRUE(admission.Admit(600).ok());
  EXPECT_EQ(admission.Admit(401).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(admission.Admit(400).ok());
  EXPECT_EQ(admission.Admit(1).code(), absl::StatusCode::kResourceExhausted);
  admission.Started(1, 600);
  EXPECT_TRUE(admission.Admit(600).ok());
  EXPECT_EQ(admission.waiting_tokens(), 1000);
}

}  // namespace
}  // namespace mmfree
