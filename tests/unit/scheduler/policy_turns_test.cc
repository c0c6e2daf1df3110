// Prompts of very different lengths side by side: how long a short one takes whatever long ones
// there are, and that long ones get on whatever short ones come. Time is counted in steps.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/scheduler/policy.h"

namespace mmfree {
namespace {

constexpr int64_t kLong = 16'000;

// Of one prompt, until its first token is sampled.
struct Prompt : SchedulerEntry {
  int64_t new_tokens = 1;
  int64_t emitted = 0;
  int64_t arrived_in = 0;      // step
  int64_t first_token_in = 0;  // 0: not yet
};

class PolicyTurnsTest : public ::testing::Test {
 protected:
  void Start(const Policy::Options& options, int64_t prompt_budget) {
    policy_ = std::make_unique<Policy>(options);
    prompt_budget_ = prompt_budget;
  }
  ~PolicyTurnsTest() override {
    for (const auto& prompt : prompts_) {
      if (prompt->phase != Phase::kNone) policy_->Remove(prompt.get());
    }
    EXPECT_TRUE(policy_->empty());
  }

  Prompt* Add(int64_t tokens, int64_t new_tokens = 1, Priority priority = Priority::kNormal) {
    prompts_.push_back(std::make_unique<Prompt>());
    Prompt* const prompt = prompts_.back().get();
    prompt->id = prompts_.size();
    prompt->prompt_tokens = tokens;
    prompt->new_tokens = new_tokens;
    prompt->priority = priority;
    prompt->arrived_in = step_;
    policy_->Enqueue(prompt, absl::FromUnixMillis(step_));
    return prompt;
  }

  // A millisecond each.
  void Step() {
    ++step_;
    policy_->PlanStep(absl::FromUnixMillis(step_), prompt_budget_, &plan_);
    policy_->CompleteStep(plan_);
    prompt_tokens_ = plan_.tokens - plan_.decode_rows;
    for (const Policy::Row& row : plan_.rows) {
      Prompt* const prompt = static_cast<Prompt*>(row.entry);
      if (prompt->fed < prompt->prompt_tokens) continue;
      if (prompt->first_token_in == 0) prompt->first_token_in = step_;
      if (++prompt->emitted >= prompt->new_tokens) policy_->Remove(prompt);
    }
  }
  // Steps from arrival to the first token.
  int64_t StepsOf(Prompt* prompt) {
    while (prompt->first_token_in == 0) Step();
    return prompt->first_token_in - prompt->arrived_in;
  }

  std::unique_ptr<Policy> policy_;
  int64_t prompt_budget_ = 0;
  int64_t step_ = 0;
  int64_t prompt_tokens_ = 0;  // of the last step
  std::vector<std::unique_ptr<Prompt>> prompts_;
  Policy::Plan plan_;
};

TEST_F(PolicyTurnsTest, AShortPromptTakesAStepOrTwoBesideAnyNumberOfLongOnes) {
  for (const int longs : {1, 6, 300}) {
    for (const int64_t budget : {16, 100, 1024}) {
      for (const int streams : {0, 4}) {
        SCOPED_TRACE(testing::Message() << longs << " long ones, " << streams << " streams, "
                                        << budget << " prompt tokens a step");
        prompts_.clear();
        Start({.num_slots = 8, .prefill_chunk = 256, .step_token_budget = 1024}, budget);
        for (int i = 0; i < streams; ++i) Add(1, 1 << 20);
        for (int i = 0; i < longs; ++i) Add(kLong);
        for (int i = 0; i < 50; ++i) Step();
        int64_t worst = 0;
        int64_t taken = 0;
        int64_t needed = 0;
        for (int i = 0; i < 100; ++i) {
          const int64_t tokens = 1 + i * 37 % 256;
          const int64_t takes = (tokens + budget - 1) / budget;
          // One of the long ones may be as near its end, and now and then the oldest has its turn.
          const int64_t of_others = (256 + budget - 1) / budget;
          const int64_t most =
              (takes + of_others) * Policy::kAgedStep / (Policy::kAgedStep - 1) + 1;
          worst = std::max(worst, StepsOf(Add(tokens, 1 + i % 3)) - most);
          taken += StepsOf(Add(tokens));
          needed += takes;
          for (int idle = 0; idle < i % 5; ++idle) Step();
        }
        EXPECT_LE(worst, 0);
        EXPECT_LE(taken, needed * Policy::kAgedStep / (Policy::kAgedStep - 1) + 50);
        for (const auto& prompt : prompts_) {
          if (prompt->phase != Phase::kNone) policy_->Remove(prompt.get());
        }
      }
    }
  }
}

// What is short depends on what else there is.
TEST_F(PolicyTurnsTest, AMiddlingPromptOvertakesLongOnesAndIsOvertakenByShortOnes) {
  Start({.num_slots = 8, .prefill_chunk = 256, .step_token_budget = 1024}, 100);
  for (int i = 0; i < 6; ++i) Add(kLong);
  for (int i = 0; i < 20; ++i) Step();
  Prompt* const middling = Add(2000);
  for (int i = 0; i < 5; ++i) Step();
  EXPECT_LE(StepsOf(Add(50)), 2);
  EXPECT_LE(StepsOf(middling), 20 + 1 + 20 / (Policy::kAgedStep - 1) + 1);
}

// Short ones that ask for more than there is, for ever.
TEST_F(PolicyTurnsTest, LongPromptsGetOnInTheirOrderWhateverShortOnesCome) {
  constexpr int64_t kBudget = 128;
  constexpr int kLongs = 4;
  for (const int32_t slots : {4, 64}) {
    SCOPED_TRACE(testing::Message() << slots << " slots");
    prompts_.clear();
    Start({.num_slots = slots,
           .prefill_chunk = 128,
           .step_token_budget = 512,
           .age = absl::Milliseconds(200)},
          kBudget);
    std::vector<Prompt*> flood;
    const auto step_in_the_flood = [&] {
      while (policy_->waiting() < 20) Add(40, 4);
      Step();
    };
    for (int i = 0; i < 50; ++i) step_in_the_flood();
    std::vector<Prompt*> longs;
    const int64_t begin = step_;
    for (int i = 0; i < kLongs; ++i) longs.push_back(Add(kLong));
    // One step in kAgedStep is theirs, once they are old and have had their turn.
    const int64_t each = (kLong + kBudget - 1) / kBudget * Policy::kAgedStep + 300;
    for (int i = 0; i < kLongs; ++i) {
      while (longs[i]->first_token_in == 0 && step_ < begin + 2 * kLongs * each)
        step_in_the_flood();
      ASSERT_NE(longs[i]->first_token_in, 0);
      EXPECT_LE(longs[i]->first_token_in - begin, (i + 1) * each) << "the " << i << "th";
    }
    for (const auto& prompt : prompts_) {
      if (prompt->phase != Phase::kNone) policy_->Remove(prompt.get());
    }
  }
}

// One that got its slot for its age does not keep the others from theirs.
TEST_F(PolicyTurnsTest, ALongPromptOfALowClassHoldsUpNobodyWhenItsAgeCounts) {
  constexpr int64_t kBudget = 128;
  Start({.num_slots = 32,
         .prefill_chunk = 128,
         .step_token_budget = 512,
         .age = absl::Milliseconds(50)},
        kBudget);
  std::vector<Prompt*> lows;
  for (int i = 0; i < 3; ++i) lows.push_back(Add(kLong, 1, Priority::kLow));
  std::vector<int64_t> of_flood;  // tokens in each step
  while (lows.back()->first_token_in == 0 && step_ < 10'000) {
    while (policy_->waiting() < 20) Add(40, 1);
    Step();
    int64_t tokens = 0;
    for (size_t i = plan_.decode_rows; i < plan_.rows.size(); ++i) {
      if (plan_.rows[i].entry->priority == Priority::kNormal) tokens += plan_.rows[i].tokens;
    }
    of_flood.push_back(tokens);
  }
  ASSERT_NE(lows.back()->first_token_in, 0) << "it starved";
  constexpr size_t kWindow = 2 * Policy::kAgedStep;
  for (size_t i = kWindow; i < of_flood.size(); ++i) {
    int64_t tokens = 0;
    for (size_t j = i - kWindow; j < i; ++j) tokens += of_flood[j];
    ASSERT_GE(tokens, (static_cast<int64_t>(kWindow) - 3) * kBudget) << "before step " << i;
  }
}

}  // namespace
}  // namespace mmfree
