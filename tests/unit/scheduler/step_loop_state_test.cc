// States that leave the step loop and come back.
#include <algorithm>
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

class StepLoopDeviceTest : public StepLoopFixture {
 protected:
  // The pool of a device with so many places; `read` is of another device's backend.
  void StartWithPlaces(int32_t places) {
    device_options_.resident_slots = places;
    DevicePool::Options pool;
    pool.first_slot = device_options_.num_slots;
    pool.num_slots = places;
    pool.state_floats = static_cast<int64_t>(FakeDevice::ExpectedState({}).size());
    pool.read = [this](int32_t slot, absl::Span<float> state) {
      return backend_->ReadResident(slot, state);
    };
    pool_ = std::make_unique<DevicePool>(std::move(pool), nullptr);
    options_.device_pool = pool_.get();
    options_.vocab_size = device_options_.vocab_size;
    device_ = std::make_shared<FakeDevice>(device_options_);
    std::unique_ptr<Backend> backend = FakeDevice::MakeBackend(device_);
    backend_ = backend.get();
    loop_ = std::make_unique<StepLoop>(options_, std::move(backend), instruments_);
  }
  // Feeds `prompt` after `before`, emits `tokens`, and gives what it leaves, on a device if it can.
  std::shared_ptr<FinalState> Run(std::vector<int32_t> prompt, int64_t tokens, uint64_t position,
                                  std::shared_ptr<const DevicePlace> before) {
    GenerationRequest request = Generation(std::move(prompt), tokens);
    request.first_position = position;
    request.device_state = std::move(before);
    request.final_state = std::make_shared<FinalState>();
    request.final_on_device = true;
    const std::shared_ptr<FinalState> final_state = request.final_state;
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(std::move(request), sink);
    EXPECT_TRUE(sink->WaitForEnd().ok()) << sink->WaitForEnd().status();
    return final_state;
  }
  // The state in `place`.
  static std::vector<float> StateIn(const DevicePlace& place) {
    std::vector<float> state;
    EXPECT_TRUE(place.Read(&state).ok());
    return state;
  }
  // The fed part of a context.
  static std::vector<float> Expected(const std::vector<int32_t>& context, size_t pending) {
    return FakeDevice::ExpectedState(absl::MakeConstSpan(context).first(context.size() - pending));
  }

  std::unique_ptr<DevicePool> pool_;
  Backend* backend_ = nullptr;  // the loop's
};

TEST_F(StepLoopDeviceTest, TurnsThatGoOnFromTheDeviceAreOneContext) {
  StartWithPlaces(2);
  std::vector<int32_t> context;
  std::shared_ptr<const DevicePlace> place;
  uint64_t position = 0;
  std::vector<int32_t> pending;
  for (const auto& [prompt, tokens] :
       {std::pair(20, 5), std::pair(3, 1), std::pair(9, 0), std::pair(1, 12)}) {
    const std::vector<int32_t> text = Prompt(prompt, tokens);
    std::vector<int32_t> input = pending;
    input.insert(input.end(), text.begin(), text.end());
    const auto final_state = Run(input, tokens, position, std::move(place));
    ASSERT_NE(final_state->device, nullptr);
    EXPECT_TRUE(final_state->state.empty());
    context.insert(context.end(), text.begin(), text.end());
    const std::vector<int32_t> expected = ExpectedIds(context, tokens);
    EXPECT_EQ(final_state->emitted, expected);
    context.insert(context.end(), expected.begin(), expected.end());
    pending = final_state->pending;
    EXPECT_EQ(StateIn(*final_state->device), Expected(context, pending.size()));
    position += static_cast<uint64_t>(final_state->fed);
    place = final_state->device;
  }
}

TEST_F(StepLoopDeviceTest, WithoutAFreePlaceTheStateComesToTheHost) {
  StartWithPlaces(1);
  const auto taken = pool_->Take();
  const auto final_state = Run(Prompt(6), 3, 0, nullptr);
  EXPECT_EQ(final_state->device, nullptr);
  std::vector<int32_t> context = Prompt(6);
  const std::vector<int32_t> emitted = ExpectedIds(context, 3);
  context.insert(context.end(), emitted.begin(), emitted.end());
  EXPECT_EQ(final_state->state, Expected(context, 1));
}

TEST_F(StepLoopDeviceTest, AStateOnAnotherDeviceIsRead) {
  StartWithPlaces(2);
  DevicePool::Options options;
  options.num_slots = 1;
  options.state_floats = static_cast<int64_t>(FakeDevice::ExpectedState({}).size());
  absl::Status read_status;
  options.read = [&](int32_t, absl::Span<float> state) {
    const std::vector<float> there = FakeDevice::ExpectedState(Prompt(10));
    std::copy(there.begin(), there.end(), state.begin());
    return read_status;
  };
  DevicePool other(std::move(options), nullptr);
  std::vector<int32_t> context = Prompt(10);
  const std::vector<int32_t> more = Prompt(4, 3);
  context.insert(context.end(), more.begin(), more.end());
  EXPECT_EQ(Run(more, 2, 10, other.Take())->emitted, ExpectedIds(context, 2));

  read_status = absl::InternalError("bus");
  GenerationRequest request = Generation(more, 2);
  request.first_position = 10;
  request.device_state = other.Take();
  EXPECT_EQ(loop_->Submit(std::move(request), std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kInternal);
}

TEST_F(StepLoopDeviceTest, EveryEndGivesThePlacesBack) {
  StartWithPlaces(1);
  const auto cancelled = std::make_shared<CollectingSink>();
  {
    GenerationRequest request = Generation(Prompt(5), 1 << 20);
    request.device_state = pool_->Take();
    ASSERT_TRUE(backend_->CopySlot(0, request.device_state->slot()).ok());
    request.final_state = std::make_shared<FinalState>();
    request.final_on_device = true;
    const RequestHandle handle = MustSubmit(std::move(request), cancelled);
    cancelled->WaitForTokens(1);
    loop_->Cancel(handle);
  }
  EXPECT_FALSE(cancelled->WaitForEnd().ok());
  loop_.reset();
  EXPECT_NE(pool_->Take(), nullptr);
}

TEST_F(StepLoopDeviceTest, AfterAFaultOfTheDeviceItsPoolIsClosed) {
  StartWithPlaces(2);
  SessionState context;
  context.device = pool_->Take();
  pool_->Put(1, std::move(context));
  device_->FailNextStep(absl::InternalError("fault"));
  const auto sink = std::make_shared<CollectingSink>();
  MustSubmit(Generation(Prompt(3), 1), sink);
  EXPECT_FALSE(sink->WaitForEnd().ok());
  loop_->Drain(absl::InfiniteFuture());
  EXPECT_EQ(pool_->Get(1), nullptr);
  EXPECT_EQ(pool_->Take(), nullptr);
}

}  // namespace
}  // namespace mmfree
