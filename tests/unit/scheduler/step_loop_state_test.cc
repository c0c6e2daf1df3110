// States that leave the step loop and come back.
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

using StepLoopStateTest = StepLoopFixture;

// Runs one turn on `context` and gives its tokens; `context` becomes what it leaves.
std::vector<int32_t> RunTurn(
    const std::function<void(GenerationRequest, std::shared_ptr<CollectingSink>)>& submit,
    GenerationRequest request, FinalState* context, uint64_t* position) {
  request.first_position = *position;
  request.prompt.insert(request.prompt.begin(), context->pending.begin(), context->pending.end());
  if (!context->state.empty()) {
    request.initial_state = std::make_shared<const std::vector<float>>(context->state);
  }
  const auto final_state = std::make_shared<FinalState>();
  request.final_state = final_state;
  auto sink = std::make_shared<CollectingSink>();
  submit(std::move(request), sink);
  EXPECT_TRUE(sink->WaitForEnd().ok());
  *context = *final_state;
  *position += static_cast<uint64_t>(final_state->fed);
  return sink->ids();
}

TEST_F(StepLoopStateTest, TurnsThatGoOnFromTheFinalStateAreOneContext) {
  Start();
  const auto submit = [this](GenerationRequest request, std::shared_ptr<CollectingSink> sink) {
    MustSubmit(std::move(request), std::move(sink));
  };
  std::vector<int32_t> context;  // everything, pending tokens included
  FinalState state;
  uint64_t position = 0;
  for (const auto& [prompt, tokens] : {std::pair(20, 5), std::pair(3, 1), std::pair(0, 7),
                                       std::pair(9, 0), std::pair(0, 4), std::pair(1, 0)}) {
    GenerationRequest request = Generation(Prompt(prompt), tokens);
    request.eos_token_ids.clear();
    context.insert(context.end(), request.prompt.begin(), request.prompt.end());
    std::vector<int32_t> expected;
    for (const SampledToken& token : device_->Expected(context, request.sampling, tokens)) {
      expected.push_back(token.token);
    }
    EXPECT_EQ(RunTurn(submit, std::move(request), &state, &position), expected);
    context.insert(context.end(), expected.begin(), expected.end());
    EXPECT_EQ(position + state.pending.size(), context.size());
    EXPECT_EQ(state.pending, std::vector<int32_t>{context.back()});
  }
}

TEST_F(StepLoopStateTest, AfterAnEndTokenNothingIsPendingAndTheEndIsNoPartOfTheContext) {
  Start();
  GenerationRequest request = Generation(Prompt(10), 50);
  const std::vector<SampledToken> expected = device_->Expected(request.prompt, request.sampling, 4);
  request.eos_token_ids = {expected[3].token};
  const auto final_state = std::make_shared<FinalState>();
  request.final_state = final_state;
  auto sink = std::make_shared<CollectingSink>();
  const std::vector<int32_t> prompt = request.prompt;
  MustSubmit(std::move(request), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  ASSERT_EQ(sink->ids().size(), 3u);
  EXPECT_EQ(final_state->fed, 10 + 3);
  EXPECT_TRUE(final_state->pending.empty());
  EXPECT_EQ(final_state->emitted, sink->ids());
}

// Settles tokens late and at random, and ends the output after so many.
class LateStop final : public StopCondition {
 public:
  LateStop(int tokens, uint32_t seed) : tokens_(tokens), random_(seed) {}
  bool Append(int32_t) override {
    ++seen_;
    if (seen_ == tokens_) return true;
    if (random_() % 3 == 0) settled_ += static_cast<int64_t>(random_() % (seen_ - settled_ + 1));
    return false;
  }
  int64_t settled() const override { return settled_; }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<LateStop>(*this);
  }

 private:
  const int tokens_;
  int64_t seen_ = 0;
  int64_t settled_ = 0;
  std::mt19937 random_;
};

// Whatever of the open tokens is part of the context, a turn can go on from there.
TEST_F(StepLoopStateTest, AStopConditionLeavesTheStateBeforeTheOpenTokens) {
  Start();
  std::mt19937 random(1);
  int open = 0;
  for (uint32_t round = 0; round < 60; ++round) {
    const int tokens = 1 + static_cast<int>(random() % 30);
    const std::vector<int32_t> prompt = Prompt(1 + static_cast<int>(random() % 9));
    GenerationRequest request = Generation(prompt, 40);
    request.eos_token_ids.clear();
    request.speculative_tokens = 4;
    const auto stop = std::make_shared<LateStop>(tokens, round);
    request.stop_condition = stop;
    const auto final_state = std::make_shared<FinalState>();
    request.final_state = final_state;
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(std::move(request), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    std::vector<int32_t> context = prompt;
    const std::vector<int32_t> emitted = sink->ids();
    ASSERT_EQ(emitted.size(), static_cast<size_t>(tokens));
    context.insert(context.end(), emitted.begin(), emitted.end());
    ASSERT_LE(final_state->fed, static_cast<int64_t>(prompt.size()) + stop->settled());
    ASSERT_EQ(final_state->pending,
              std::vector<int32_t>(context.begin() + final_state->fed, context.end()));
    ASSERT_FALSE(final_state->pending.empty());
    // Going on from some of them is what going on from that context is.
    const size_t kept =
        static_cast<size_t>(final_state->fed) + 1 + random() % final_state->pending.size();
    context.resize(kept);
    GenerationRequest next = Generation({}, 5);
    next.eos_token_ids.clear();
    next.prompt.assign(context.begin() + final_state->fed, context.end());
    next.first_position = static_cast<uint64_t>(final_state->fed);
    next.initial_state = std::make_shared<const std::vector<float>>(final_state->state);
    sink = std::make_shared<CollectingSink>();
    MustSubmit(std::move(next), sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    std::vector<int32_t> expected;
    for (const SampledToken& token : device_->Expected(context, Generation({}, 5).sampling, 5)) {
      expected.push_back(token.token);
    }
    EXPECT_EQ(sink->ids(), expected);
    open += final_state->pending.size() > 1;
  }
  EXPECT_GT(open, 20);
}

TEST_F(StepLoopStateTest, RemembersTheLastEmittedTokensOnly) {
  Start();
  GenerationRequest request = Generation(Prompt(4), 5000);
  request.eos_token_ids.clear();
  const auto final_state = std::make_shared<FinalState>();
  request.final_state = final_state;
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(std::move(request), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  const std::vector<int32_t> ids = sink->ids();
  // The last one is pending.
  EXPECT_EQ(final_state->emitted, std::vector<int32_t>(ids.end() - kMaxFinalTokens - 1, ids.end()));
}

}  // namespace
}  // namespace mmfree
