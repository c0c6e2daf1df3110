// States that leave the step loop and come back.
#include <functional>
#include <memory>
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
  EXPECT_EQ(final_state->emitted, std::vector<int32_t>(ids.end() - kMaxFinalTokens, ids.end()));
}

}  // namespace
}  // namespace mmfree
