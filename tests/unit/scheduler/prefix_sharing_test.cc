// Prompts that begin alike are fed once, whatever happens meanwhile, and nobody can tell by the
// tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/prefix_cache/prefix_cache.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

class PrefixSharingTest : public StepLoopFixture {
 protected:
  PrefixSharingTest() { options_.prefixes.interval = 64; }
  ~PrefixSharingTest() override { loop_.reset(); }

  void StartSharing(int64_t cache_bytes = int64_t{1} << 30) {
    cache_ = std::make_unique<PrefixCache>(cache_bytes, nullptr);
    options_.prefixes.cache = cache_.get();
    options_.prefixes.model_digest = "digest";
    Start();
  }

  // `shared` tokens that are the same for each `salt`, then `own` others.
  std::vector<int32_t> Tail(int shared, int own, int salt) const {
    std::vector<int32_t> prompt = Prompt(shared);
    for (int i = 0; i < own; ++i) {
      prompt.push_back((salt * 17 + i * 5) % device_options_.vocab_size);
    }
    // The first own token differs between different salts, and from what the prompt goes on with.
    if (own > 0) {
      prompt[shared] = (Prompt(shared + 1).back() + 1 + salt) % device_options_.vocab_size;
    }
    return prompt;
  }

  struct Sent {
    GenerationRequest request;
    std::shared_ptr<CollectingSink> sink;
    RequestHandle handle = 0;
  };
  Sent Send(GenerationRequest request) {
    Sent sent{request, std::make_shared<CollectingSink>()};
    sent.handle = MustSubmit(std::move(request), sent.sink);
    return sent;
  }
  Sent Send(std::vector<int32_t> prompt, int64_t max_new_tokens = 3) {
    return Send(Generation(std::move(prompt), max_new_tokens));
  }

  // Waits for a good end, checks the tokens, and gives those that were cached.
  int64_t Cached(const Sent& sent) const {
    const absl::StatusOr<GenerationResult>& result = sent.sink->WaitForEnd();
    EXPECT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(sent.sink->ids(),
              ExpectedIds(sent.request.prompt, static_cast<int>(sent.request.max_new_tokens),
                          sent.request.sampling));
    if (!result.ok()) return -1;
    EXPECT_EQ(result->usage.prompt_tokens, static_cast<int64_t>(sent.request.prompt.size()));
    return result->usage.cached_tokens;
  }

  double FedTokens() const { return Metric("mmfree_prompt_tokens_total"); }

  std::unique_ptr<PrefixCache> cache_;
};

TEST_F(PrefixSharingTest, APromptThatCameBeforeIsFedFromItsLastTokenOn) {
  StartSharing();
  const std::vector<int32_t> prompt = Prompt(150);
  EXPECT_EQ(loop_->CachedTokens(Generation(prompt, 3)), 0);
  EXPECT_EQ(Cached(Send(prompt)), 0);
  EXPECT_EQ(loop_->CachedTokens(Generation(prompt, 3)), 149);
  EXPECT_EQ(Cached(Send(prompt)), 149);
  // One that goes on where it ended, and one that is a part of it.
  EXPECT_EQ(Cached(Send(Prompt(180))), 149);
  EXPECT_EQ(Cached(Send(Prompt(140))), 128);
  EXPECT_EQ(FedTokens(), 150 + 1 + 31 + 12);
  EXPECT_EQ(Metric("mmfree_prefix_cache_hits_total"), 3);
  EXPECT_EQ(Metric("mmfree_prefix_cache_misses_total"), 1);
  EXPECT_EQ(Metric("mmfree_prefix_cache_cached_tokens_total"), 149 + 149 + 128);
}

TEST_F(PrefixSharingTest, WhereTwoPromptsPartTheThirdHits) {
  StartSharing();
  for (const int shared : {16, 37, 64, 100, 101, 127, 200}) {
    cache_ = nullptr;
    loop_ = nullptr;
    StartSharing();
    EXPECT_EQ(Cached(Send(Tail(shared, 40, 1))), 0);
    const int64_t second = Cached(Send(Tail(shared, 40, 2)));
    EXPECT_EQ(second, shared / 64 * 64) << shared;
    const int64_t third = Cached(Send(Tail(shared, 40, 3)));
    EXPECT_LE(third, shared);
    EXPECT_GT(third, shared - PrefixSharing::kLeastGain) << shared;
  }
}

TEST_F(PrefixSharingTest, APromptShiftedByOneTokenSharesNothing) {
  StartSharing();
  std::vector<int32_t> prompt = Prompt(100);
  EXPECT_EQ(Cached(Send(prompt)), 0);
  prompt.insert(prompt.begin(), 5);
  EXPECT_EQ(Cached(Send(prompt)), 0);
}

TEST_F(PrefixSharingTest, CallersAndSaltsDoNotShare) {
  StartSharing();
  const auto send = [this](const std::string& caller, const std::string& salt) {
    GenerationRequest request = Generation(Prompt(100), 2);
    request.caller = caller;
    request.cache_salt = salt;
    return Cached(Send(std::move(request)));
  };
  const std::vector<std::pair<std::string, std::string>> callers = {
      {"alice", ""}, {"bob", ""}, {"", ""}, {"alice", "x"}, {"", "alicex"}, {"al", "icex"}};
  for (const auto& [caller, salt] : callers) EXPECT_EQ(send(caller, salt), 0) << caller << salt;
  for (const auto& [caller, salt] : callers) EXPECT_EQ(send(caller, salt), 99) << caller << salt;
}

TEST_F(PrefixSharingTest, NeitherAContextThatGoesOnNorAScoredPromptUsesTheCache) {
  StartSharing();
  EXPECT_EQ(Cached(Send(Prompt(100))), 0);
  GenerationRequest scored = Generation(Prompt(100), 3);
  scored.prompt_logprobs = true;
  EXPECT_EQ(Cached(Send(scored)), 0);

  GenerationRequest later = Generation(Prompt(100), 3);
  const std::vector<int32_t> before = {1, 2, 3};
  later.first_position = 3;
  later.initial_state =
      std::make_shared<const std::vector<float>>(FakeDevice::ExpectedState(before));
  const Sent sent = Send(later);
  ASSERT_TRUE(sent.sink->WaitForEnd().ok());
  std::vector<int32_t> context = before;
  context.insert(context.end(), later.prompt.begin(), later.prompt.end());
  EXPECT_EQ(sent.sink->ids(), ExpectedIds(context, 3));
  EXPECT_EQ(sent.sink->WaitForEnd()->usage.cached_tokens, 0);

  auto score = std::make_shared<CollectingScoreSink>();
  ScoreRequest request;
  request.tokens = Prompt(100);
  ASSERT_TRUE(loop_->Submit(request, score).ok());
  ASSERT_TRUE(score->WaitForEnd().ok());
  EXPECT_EQ(score->WaitForEnd()->logprobs.size(), 99u);
  EXPECT_EQ(FedTokens(), 400);
}

TEST_F(PrefixSharingTest, AStateToBeReadBeforeTheLastTokenIsTheSameFromTheCache) {
  StartSharing();
  const std::vector<int32_t> prompt = Prompt(100);
  for (int i = 0; i < 3; ++i) {
    GenerationRequest request = Generation(prompt, 0);
    const auto final_state = std::make_shared<FinalState>();
    request.final_state = final_state;
    EXPECT_EQ(Cached(Send(request)), i == 0 ? 0 : 99);
    EXPECT_EQ(final_state->state, FakeDevice::ExpectedState(absl::MakeConstSpan(prompt).first(99)));
    EXPECT_EQ(final_state->fed, 99);
    EXPECT_EQ(final_state->pending, std::vector<int32_t>{prompt.back()});
  }
}

TEST_F(PrefixSharingTest, AThousandRequestsAtOnceFeedTheirPrefixOnce) {
  options_.policy.prefill_chunk = 256;
  options_.policy.step_token_budget = 1024;
  options_.prefixes.interval = 256;
  options_.max_queue = 2000;
  for (const int slots : {4, 256}) {
    cache_ = nullptr;
    loop_ = nullptr;
    device_options_.num_slots = slots;
    StartSharing();
    const double before = FedTokens();
    device_->CloseGate();
    std::vector<Sent> sent;
    for (int i = 0; i < 1000; ++i) sent.push_back(Send(Tail(2000, 10, i), 2));
    device_->OpenGate();
    int64_t missed = 0;
    for (const Sent& one : sent) missed += Cached(one) < 2000 ? 1 : 0;
    EXPECT_EQ(missed, 1);
    // Tails begin with one of 97 tokens, and so does each of those share some more.
    EXPECT_LE(FedTokens() - before, 2000 + 1000 * 10);
  }
}

TEST_F(PrefixSharingTest, SharingNeedsNoRoomInTheCache) {
  device_options_.num_slots = 64;
  StartSharing(/*cache_bytes=*/0);
  device_->CloseGate();
  std::vector<Sent> sent;
  for (int i = 0; i < 40; ++i) sent.push_back(Send(Tail(500, 20, i), 2));
  device_->OpenGate();
  for (size_t i = 0; i < sent.size(); ++i) EXPECT_EQ(Cached(sent[i]), i == 0 ? 0 : 500);
  EXPECT_EQ(FedTokens(), 500 + 40 * 20);
  EXPECT_EQ(cache_->bytes(), 0);
}

// Someone feeds a long prefix, held up in a step, and others wait for it.
class JoinedFeedTest : public PrefixSharingTest {
 protected:
  void StartJoined(Priority priority = Priority::kNormal,
                   absl::Time deadline = absl::InfiniteFuture()) {
    StartSharing();
    device_->CloseGate();
    GenerationRequest first = Generation(Tail(200, 20, 0), 3);
    first.priority = priority;
    first.deadline = deadline;
    feeder_ = Send(first);
    device_->WaitUntilHeldUp();
    for (int i = 1; i < 4; ++i) {
      GenerationRequest request = Generation(Tail(200, 20, i), 3);
      request.priority = priority;
      joiners_.push_back(Send(request));
    }
    // In the second of these steps the others have come.
    for (int i = 0; i < 3; ++i) {
      device_->ReleaseSteps(1);
      device_->WaitUntilHeldUp();
    }
    for (const FakeDevice::StepRecord& step : device_->steps()) ASSERT_EQ(step.size(), 1u);
  }

  Sent feeder_;
  std::vector<Sent> joiners_;
};

TEST_F(JoinedFeedTest, OthersWaitForWhatIsBeingFed) {
  device_options_.num_slots = 8;
  StartJoined();
  device_->OpenGate();
  EXPECT_EQ(Cached(feeder_), 0);
  for (const Sent& joiner : joiners_) EXPECT_EQ(Cached(joiner), 200);
  EXPECT_EQ(FedTokens(), 200 + 4 * 20);
  EXPECT_EQ(Metric("mmfree_prefix_cache_joins_total"), 3);
}

TEST_F(JoinedFeedTest, WhenTheFeederIsCancelledTheNextTakesOver) {
  device_options_.num_slots = 8;
  StartJoined();
  loop_->Cancel(feeder_.handle);
  device_->OpenGate();
  EXPECT_EQ(feeder_.sink->WaitForEnd().status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(Cached(joiners_[0]), 0);
  EXPECT_EQ(Cached(joiners_[1]), 200);
  EXPECT_EQ(Cached(joiners_[2]), 200);
}

TEST_F(JoinedFeedTest, WhenTheFeederMissesItsDeadlineTheNextTakesOver) {
  device_options_.num_slots = 8;
  StartJoined(Priority::kNormal, clock_.Now() + absl::Milliseconds(6));
  device_->OpenGate();
  EXPECT_EQ(feeder_.sink->WaitForEnd().status().code(), absl::StatusCode::kDeadlineExceeded);
  for (const Sent& joiner : joiners_) Cached(joiner);
}

TEST_F(JoinedFeedTest, WhenTheFeederIsPreemptedTheNextTakesOver) {
  device_options_.num_slots = 4;
  StartJoined(Priority::kLow);
  std::vector<Sent> urgent;
  for (int i = 0; i < 4; ++i) {
    GenerationRequest request = Generation(Prompt(60, 5 + i), 40);
    request.priority = Priority::kHigh;
    urgent.push_back(Send(request));
  }
  device_->OpenGate();
  for (const Sent& one : urgent) Cached(one);
  Cached(feeder_);
  for (const Sent& joiner : joiners_) Cached(joiner);
  EXPECT_GE(Metric("mmfree_num_preemptions_total"), 4);
}

TEST_F(JoinedFeedTest, OneThatWaitsCanBeCancelledAndMissItsDeadline) {
  device_options_.num_slots = 8;
  StartJoined();
  GenerationRequest late = Generation(Tail(200, 20, 9), 3);
  late.deadline = clock_.Now() + absl::Minutes(1);
  const Sent overdue = Send(late);
  loop_->Cancel(joiners_[1].handle);
  device_->ReleaseSteps(1);
  device_->WaitUntilHeldUp();
  clock_.Advance(absl::Minutes(2));
  device_->OpenGate();
  EXPECT_EQ(joiners_[1].sink->WaitForEnd().status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(overdue.sink->WaitForEnd().status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Cached(joiners_[0]), 200);
  EXPECT_EQ(Cached(joiners_[2]), 200);
}

TEST_F(JoinedFeedTest, AHigherClassDoesNotWaitForALowerOne) {
  device_options_.num_slots = 8;
  StartJoined(Priority::kLow);
  GenerationRequest request = Generation(Tail(200, 20, 9), 3);
  request.priority = Priority::kHigh;
  const Sent urgent = Send(request);
  device_->OpenGate();
  EXPECT_LT(Cached(urgent), 200);
  for (const Sent& joiner : joiners_) Cached(joiner);
}

// The bound on tokens that wait is for what will be fed.
TEST_F(PrefixSharingTest, QueuedPromptsCountWhatTheyHaveInCommonOnce) {
  device_options_.num_slots = 1;
  options_.max_queue_tokens = 1000;
  StartSharing();
  device_->CloseGate();
  const Sent running = Send(Prompt(1), 1000);
  device_->WaitUntilHeldUp();
  std::vector<Sent> queued;
  for (int i = 0; i < 20; ++i) queued.push_back(Send(Tail(500, 10, i), 3));
  EXPECT_EQ(loop_->load().waiting_tokens, 500 + 20 * 10);
  EXPECT_EQ(loop_->Submit(Generation(Prompt(500, 3), 1), std::make_shared<CollectingSink>())
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  // The one that came first leaves, and the others still have its beginning to feed.
  loop_->Cancel(queued[0].handle);
  loop_->Cancel(running.handle);
  device_->OpenGate();
  EXPECT_FALSE(queued[0].sink->WaitForEnd().ok());
  for (size_t i = 1; i < queued.size(); ++i) Cached(queued[i]);
  // The second one starts at the last checkpoint before the place where it parts from the first.
  EXPECT_LE(FedTokens(), 1 + 500 + 19 * 10 + options_.prefixes.interval);
  EXPECT_EQ(loop_->load().waiting_tokens, 0);
}

// Of a prompt that others overtake for its length, what a short one waits for is fed as soon as it
// would feed that itself.
TEST_F(PrefixSharingTest, WhatAShortPromptWaitsForIsNotOvertakenByLongerOnes) {
  device_options_.num_slots = 16;
  options_.policy.step_token_budget = 16;
  StartSharing();
  device_->CloseGate();
  const Sent feeder = Send(Tail(24, 4000, 0));
  device_->WaitUntilHeldUp();
  std::vector<Sent> middling;
  for (int i = 1; i < 8; ++i) middling.push_back(Send(Prompt(200, i)));
  const Sent joiner = Send(Tail(24, 6, 1));
  device_->OpenGate();
  EXPECT_EQ(Cached(joiner), 24);
  // The step under way, one in which it gets its slot, two for the rest of the prefix, its own.
  const Timings& timings = joiner.sink->WaitForEnd()->timings;
  EXPECT_LE(timings.queued + timings.prefill, 6 * device_options_.step_time);
  for (const Sent& one : middling) Cached(one);
  loop_->Cancel(feeder.handle);
}

TEST_F(JoinedFeedTest, WhenADeviceFaultEndsTheFeederEverybodyEnds) {
  device_options_.num_slots = 8;
  StartJoined();
  device_->FailNextStep(absl::InternalError("broken"));
  device_->OpenGate();
  EXPECT_FALSE(feeder_.sink->WaitForEnd().ok());
  for (const Sent& joiner : joiners_) EXPECT_FALSE(joiner.sink->WaitForEnd().ok());
}

TEST_F(JoinedFeedTest, WhenTheFeedersStepIsRefusedTheNextTakesOver) {
  device_options_.num_slots = 8;
  StartJoined();
  device_->FailNextStep(absl::InvalidArgumentError("a bug"));
  device_->OpenGate();
  EXPECT_FALSE(feeder_.sink->WaitForEnd().ok());
  for (const Sent& joiner : joiners_) Cached(joiner);
}

// Everything at once: prompts that share random prefixes, classes, callers, salts, preemption,
// cancels, deadlines, readers that stop, budgets that drive out what is about to be used.
TEST_F(PrefixSharingTest, WhateverIsSharedEvictedOrCancelledNoTokenChanges) {
  int64_t hits = 0;
  int64_t joins = 0;
  for (uint32_t seed = 0; seed < 24; ++seed) {
    std::mt19937 random(seed);
    cache_ = nullptr;
    loop_ = nullptr;
    device_options_.num_slots = 1 + static_cast<int32_t>(random() % 12);
    options_.policy.prefill_chunk = 1 + static_cast<int32_t>(random() % 40);
    options_.policy.step_token_budget = 16 + static_cast<int32_t>(random() % 100);
    options_.policy.age = absl::Milliseconds(20);
    options_.prefixes.interval = seed % 3 == 0 ? 0 : 1 + static_cast<int64_t>(random() % 100);
    options_.max_stream_backlog = 4;
    StartSharing(seed % 4 == 0 ? int64_t{1} << 30 : static_cast<int64_t>(random() % 20'000));

    std::vector<std::vector<int32_t>> prompts;
    std::vector<Sent> sent;
    std::vector<bool> may_fail;
    device_->CloseGate();
    GenerationRequest endless = Generation(Prompt(3), 1'000'000);
    endless.priority = Priority::kLow;
    const RequestHandle background = MustSubmit(endless, std::make_shared<CollectingSink>());
    for (int i = 0; i < 120; ++i) {
      std::vector<int32_t> prompt;
      if (!prompts.empty() && random() % 5 != 0) {
        prompt = prompts[random() % prompts.size()];
        prompt.resize(1 + random() % prompt.size());
      }
      const size_t own = random() % 80 + (prompt.empty() ? 1 : 0);
      for (size_t t = 0; t < own; ++t) {
        prompt.push_back(static_cast<int32_t>(random() % device_options_.vocab_size));
      }
      prompts.push_back(prompt);
      GenerationRequest request = Generation(prompt, static_cast<int64_t>(random() % 8));
      request.priority = static_cast<Priority>(random() % 3);
      request.caller = std::string(random() % 2, 'c');
      request.cache_salt = random() % 8 == 0 ? "salt" : "";
      request.sampling.temperature = 1.0f;
      request.sampling.seed = random();
      bool fails = false;
      if (random() % 10 == 0) {
        request.deadline = clock_.Now() + absl::Milliseconds(1 + random() % 200);
        fails = true;
      }
      Sent one{request, std::make_shared<CollectingSink>(random() % 6 == 0
                                                             ? CollectingSink::Reader::kIdle
                                                             : CollectingSink::Reader::kEager)};
      const absl::StatusOr<RequestHandle> handle = loop_->Submit(request, one.sink);
      if (!handle.ok()) {
        EXPECT_EQ(handle.status().code(), absl::StatusCode::kDeadlineExceeded);
        continue;
      }
      one.handle = *handle;
      sent.push_back(one);
      may_fail.push_back(fails);
      if (random() % 10 == 0) {
        const size_t victim = random() % sent.size();
        loop_->Cancel(sent[victim].handle);
        may_fail[victim] = true;
      }
      for (uint32_t step = random() % 4; step > 0; --step) {
        device_->WaitUntilHeldUp();
        device_->ReleaseSteps(1);
      }
    }
    device_->OpenGate();
    loop_->Cancel(background);
    for (size_t i = 0; i < sent.size(); ++i) {
      sent[i].sink->StartReading();
      const absl::StatusOr<GenerationResult>& result = sent[i].sink->WaitForEnd();
      if (!result.ok()) {
        EXPECT_TRUE(may_fail[i]) << result.status();
        continue;
      }
      ASSERT_GE(Cached(sent[i]), 0);
      ASSERT_LT(Cached(sent[i]), result->usage.prompt_tokens);
    }
    loop_ = nullptr;
    ASSERT_EQ(device_->violations(), std::vector<std::string>()) << "seed " << seed;
  }
  hits = static_cast<int64_t>(Metric("mmfree_prefix_cache_hits_total"));
  joins = static_cast<int64_t>(Metric("mmfree_prefix_cache_joins_total"));
  EXPECT_GT(hits, 200);
  EXPECT_GT(joins, 20);
  EXPECT_GT(Metric("mmfree_num_preemptions_total"), 20);
}

}  // namespace
}  // namespace mmfree
