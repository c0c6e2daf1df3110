#include "server/scheduler/turn_order.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

class TurnOrderTest : public ::testing::Test {
 protected:
  // Gets in line for a slot.
  SchedulerEntry* Add(const std::string& caller, int32_t share = 1, int64_t prompt_tokens = 1) {
    entries_.push_back(std::make_unique<SchedulerEntry>());
    SchedulerEntry* const entry = entries_.back().get();
    entry->id = entries_.size();
    entry->caller = caller;
    entry->share = share;
    entry->prompt_tokens = prompt_tokens;
    order_.Join(entry);
    order_.Append(entry, Line::kWaiting);
    return entry;
  }

  SchedulerEntry* Next(bool slot_left = true) { return order_.Next(Priority::kNormal, slot_left); }

  // It has its slot, and waits for the next chunk after so many tokens of its prompt.
  void Begin(SchedulerEntry* entry, int64_t fed) {
    order_.Withdraw(entry);
    entry->begun = true;
    entry->fed = fed;
    order_.Prepend(entry, Line::kFeeding);
  }

  // The next caller, whose entry is admitted, processed and gone.
  std::string Serve(int64_t prompt, int64_t decoded) {
    SchedulerEntry* const entry = Next();
    if (entry == nullptr) return "";
    order_.TookTurn(entry);
    order_.Withdraw(entry);
    order_.Charge(entry, prompt);
    order_.Charge(entry, decoded);
    const std::string caller = entry->caller;
    order_.Leave(entry);
    return caller;
  }

  static constexpr int64_t kChunk = 100;
  TurnOrder order_{kChunk};
  std::vector<std::unique_ptr<SchedulerEntry>> entries_;
};

TEST_F(TurnOrderTest, AFloodOfOneCallerDoesNotDelayAnother) {
  for (int i = 0; i < 100; ++i) Add("flood");
  Serve(10, 10);
  Serve(10, 10);
  Add("other");
  EXPECT_EQ(Serve(10, 10), "other");
  EXPECT_EQ(Serve(10, 10), "flood");
}

TEST_F(TurnOrderTest, ServiceIsInProportionToTheShares) {
  for (int i = 0; i < 2000; ++i) {
    Add("a", 1);
    Add("b", 2);
    Add("c", 5);
  }
  std::map<std::string, int64_t> tokens;
  for (int i = 0; i < 1600; ++i) {
    const int64_t size = 10 + i * 7 % 90;
    const std::string caller = Next()->caller;
    ASSERT_EQ(Serve(size, size / 2), caller);
    tokens[caller] += size + size / 2;
  }
  EXPECT_NEAR(static_cast<double>(tokens["b"]) / tokens["a"], 2, 0.05);
  EXPECT_NEAR(static_cast<double>(tokens["c"]) / tokens["a"], 5, 0.1);
}

TEST_F(TurnOrderTest, WhatWasChargedTooMuchIsGivenBack) {
  SchedulerEntry* const first = Add("a");
  Add("b");
  order_.Charge(first, 1000);
  EXPECT_EQ(Next()->caller, "b");
  order_.Charge(first, -1000);
  EXPECT_EQ(Next()->caller, "a");
}

TEST_F(TurnOrderTest, OfACallersPromptsTheShortestByTheOrderOfMagnitudeThenTheFirst) {
  SchedulerEntry* const longest = Add("a", 1, 60 * kChunk);
  SchedulerEntry* const middle = Add("a", 1, 5 * kChunk);
  SchedulerEntry* const shorts[] = {Add("a", 1, kChunk), Add("a", 1, 1), Add("a", 1, kChunk)};
  for (SchedulerEntry* entry : shorts) {
    EXPECT_EQ(Next(), entry);
    order_.Withdraw(entry);
  }
  SchedulerEntry* const as_middle = Add("a", 1, 2 * kChunk + 1);
  as_middle->cached = kChunk;  // what need not be fed does not count
  order_.Refile(as_middle);
  EXPECT_EQ(Next(), as_middle);
  order_.Withdraw(as_middle);
  EXPECT_EQ(Next(), middle);
  order_.Withdraw(middle);
  EXPECT_EQ(Next(), longest);
}

TEST_F(TurnOrderTest, OfEqualsOneThatHasBegunComesFirstAndWithoutASlotNobodyElse) {
  SchedulerEntry* const waits = Add("a", 1, 8 * kChunk);
  SchedulerEntry* const begun = Add("a", 1, 20 * kChunk);
  Begin(begun, kChunk);
  EXPECT_EQ(Next(), waits);
  Begin(begun, 4 * kChunk);  // 16 chunks are left: as long as the other
  EXPECT_EQ(Next(), begun);
  SchedulerEntry* const brief = Add("a", 1, 1);
  EXPECT_EQ(Next(), brief);
  EXPECT_EQ(Next(/*slot_left=*/false), begun);
  order_.Withdraw(begun);
  EXPECT_EQ(Next(/*slot_left=*/false), nullptr);
}

TEST_F(TurnOrderTest, ACallersLongPromptIsAsGoodAsAnothersShortOnes) {
  SchedulerEntry* const longest = Add("a", 1, 1000 * kChunk);
  SchedulerEntry* const brief = Add("b");
  order_.Charge(brief, 1);
  EXPECT_EQ(Next(), longest);
  Begin(longest, kChunk);
  EXPECT_EQ(Next(), longest);
  order_.Charge(longest, kChunk);
  EXPECT_EQ(Next(), brief);
}

TEST_F(TurnOrderTest, OneThatOthersWaitForHasTheTurnOfAPromptThatEndsThere) {
  SchedulerEntry* const waited_for = Add("a", 1, 1000 * kChunk);
  SchedulerEntry* const other = Add("a", 1, 8 * kChunk);
  Begin(waited_for, 10);
  Begin(other, 10);
  EXPECT_EQ(Next(), other);
  waited_for->awaited = 2 * kChunk;
  order_.Refile(waited_for);
  EXPECT_EQ(Next(), waited_for);
  Begin(waited_for, 2 * kChunk);
  EXPECT_EQ(Next(), other);
}

TEST_F(TurnOrderTest, LeavingForAMomentUndoesNothingAndIdlenessEarnsNothing) {
  Add("busy");
  Add("busy");
  Serve(1000, 0);
  Add("steady");
  EXPECT_EQ(Serve(100, 0), "steady");  // level with what "busy" had when it was last admitted
  EXPECT_EQ(Serve(10, 0), "busy");
  // Both are away now. A newcomer is level with the last one admitted, not at zero.
  Add("new");
  Add("steady");
  Add("busy");
  EXPECT_NE(Next()->caller, "busy");
}

TEST_F(TurnOrderTest, AccountsAreBoundedWhateverNamesComeIn) {
  for (int i = 0; i < 20000; ++i) {
    Add(absl::StrCat("caller ", i));
    Serve(i % 7 + 1, 0);
  }
  EXPECT_LE(order_.accounts(), 4096u);
}

TEST_F(TurnOrderTest, TheOldestIsKnownAcrossClassesAndCallers) {
  SchedulerEntry* const first = Add("a");
  SchedulerEntry* const second = Add("b");
  EXPECT_EQ(order_.Oldest(Line::kWaiting), first);
  EXPECT_EQ(order_.Oldest(Line::kFeeding), nullptr);
  Begin(first, 0);
  EXPECT_EQ(order_.Oldest(Line::kFeeding), first);
  EXPECT_EQ(order_.Oldest(Line::kWaiting), second);
  order_.Withdraw(first);
  order_.Prepend(first, Line::kWaiting);
  EXPECT_EQ(order_.Oldest(Line::kWaiting), first);
}

}  // namespace
}  // namespace mmfree
