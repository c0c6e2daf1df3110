#include "server/scheduler/waiting_line.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

class WaitingLineTest : public ::testing::Test {
 protected:
  SchedulerEntry* Add(const std::string& caller, int32_t share = 1) {
    entries_.push_back(std::make_unique<SchedulerEntry>());
    SchedulerEntry* const entry = entries_.back().get();
    entry->id = entries_.size();
    entry->caller = caller;
    entry->share = share;
    line_.Join(entry);
    line_.Append(entry);
    return entry;
  }

  // The next caller, whose entry is admitted, processed and gone.
  std::string Serve(int64_t prompt, int64_t decoded) {
    SchedulerEntry* const entry = line_.Next(Priority::kNormal);
    if (entry == nullptr) return "";
    line_.Withdraw(entry);
    line_.Admitted(entry, prompt, /*in_turn=*/true);
    line_.Charge(entry, prompt);
    line_.Charge(entry, decoded);
    const std::string caller = entry->caller;
    line_.Leave(entry);
    return caller;
  }

  WaitingLine line_;
  std::vector<std::unique_ptr<SchedulerEntry>> entries_;
};

TEST_F(WaitingLineTest, AFloodOfOneCallerDoesNotDelayAnother) {
  for (int i = 0; i < 100; ++i) Add("flood");
  Serve(10, 10);
  Serve(10, 10);
  Add("other");
  EXPECT_EQ(Serve(10, 10), "other");
  EXPECT_EQ(Serve(10, 10), "flood");
}

TEST_F(WaitingLineTest, ServiceIsInProportionToTheShares) {
  for (int i = 0; i < 2000; ++i) {
    Add("a", 1);
    Add("b", 2);
    Add("c", 5);
  }
  std::map<std::string, int64_t> tokens;
  for (int i = 0; i < 1600; ++i) {
    const int64_t size = 10 + i * 7 % 90;
    const std::string caller = line_.Next(Priority::kNormal)->caller;
    ASSERT_EQ(Serve(size, size / 2), caller);
    tokens[caller] += size + size / 2;
  }
  EXPECT_NEAR(static_cast<double>(tokens["b"]) / tokens["a"], 2, 0.05);
  EXPECT_NEAR(static_cast<double>(tokens["c"]) / tokens["a"], 5, 0.1);
}

TEST_F(WaitingLineTest, APledgedPromptCountsBeforeItIsFedAndIsGivenBackWhenItIsNot) {
  SchedulerEntry* const first = Add("a");
  Add("a");
  Add("b");
  line_.Withdraw(first);
  line_.Admitted(first, 1000, /*in_turn=*/true);
  EXPECT_EQ(line_.Next(Priority::kNormal)->caller, "b");
  line_.Leave(first);
  EXPECT_EQ(line_.Next(Priority::kNormal)->caller, "a");
}

TEST_F(WaitingLineTest, LeavingForAMomentUndoesNothingAndIdlenessEarnsNothing) {
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
  EXPECT_NE(line_.Next(Priority::kNormal)->caller, "busy");
}

TEST_F(WaitingLineTest, AccountsAreBoundedWhateverNamesComeIn) {
  for (int i = 0; i < 20000; ++i) {
    Add(absl::StrCat("caller ", i));
    Serve(i % 7 + 1, 0);
  }
  EXPECT_LE(line_.accounts(), 4096u);
}

TEST_F(WaitingLineTest, TheOldestIsKnownAcrossClassesAndCallers) {
  SchedulerEntry* const first = Add("a");
  SchedulerEntry* const second = Add("b");
  EXPECT_EQ(line_.Oldest(), first);
  line_.Withdraw(first);
  EXPECT_EQ(line_.Oldest(), second);
  line_.Prepend(first);
  EXPECT_EQ(line_.Oldest(), first);
}

}  // namespace
}  // namespace mmfree
