// The prefix cache of real servers: what it spares, who may share, and that no byte depends on it.
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using Tokens = std::vector<int32_t>;

// A prefix may be kept a little before where two prompts part (PrefixSharing::kLeastGain).
constexpr int64_t kLeastGain = 16;

Tokens RandomTokens(size_t count, std::mt19937* random) {
  Tokens tokens;
  while (tokens.size() < count) tokens.push_back(static_cast<int32_t>(3 + (*random)() % 4000));
  return tokens;
}

Tokens Join(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

v1::GenerateRequest Request(const Tokens& prompt, uint32_t max_new_tokens, uint64_t seed = 1) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.mutable_sampling()->set_seed(seed);
  request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_response()->set_return_token_ids(true);
  request.mutable_response()->set_logprobs(true);
  return request;
}

std::vector<float> Logprobs(const Generation& generation) {
  std::vector<float> logprobs;
  for (const v1::GenerateResponse& event : generation.events) {
    for (const auto& logprob : event.delta().logprobs()) logprobs.push_back(logprob.logprob());
  }
  return logprobs;
}

class PrefixCacheTest : public LiveServer {
 protected:
  // Tokens of the prompt that were cached, of a request that must end well.
  int64_t Cached(const v1::GenerateRequest& request) const {
    const Generation generation = Generate(request);
    EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
    return generation.finished.usage().cached_tokens();
  }
  double FedTokens() const { return Metric("mmfree_prompt_tokens_total{"); }

  // A Generate that is under way.
  struct Open {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader;
  };
  std::unique_ptr<Open> Start(const v1::GenerateRequest& request) const {
    auto open = std::make_unique<Open>();
    open->reader = inference_->Generate(&open->context, request);
    return open;
  }
  static Tokens ReadToEnd(Open* open, int64_t* cached) {
    Tokens ids;
    v1::GenerateResponse event;
    while (open->reader->Read(&event)) {
      for (const int32_t id : event.delta().token_ids()) ids.push_back(id);
      if (event.has_finished()) *cached = event.finished().usage().cached_tokens();
    }
    EXPECT_TRUE(open->reader->Finish().ok());
    return ids;
  }
};

TEST_F(PrefixCacheTest, AThousandRequestsWithOnePrefixFeedItOnce) {
  constexpr size_t kRequests = 1000;
  constexpr size_t kPrefix = 2000;
  constexpr size_t kTail = 4;
  StartServer({"--max_queue=2000"});
  std::mt19937 random(1);
  const Tokens prefix = RandomTokens(kPrefix, &random);
  std::vector<Tokens> prompts;
  while (prompts.size() < kRequests) prompts.push_back(Join(prefix, RandomTokens(kTail, &random)));

  std::vector<std::unique_ptr<Open>> open;
  for (const Tokens& prompt : prompts) open.push_back(Start(Request(prompt, 1)));
  std::vector<Tokens> outputs;
  int64_t misses = 0;
  for (const auto& one : open) {
    int64_t cached = -1;
    outputs.push_back(ReadToEnd(one.get(), &cached));
    misses += cached < static_cast<int64_t>(kPrefix) ? 1 : 0;
  }
  // A second one, if it came when the first had passed the place where they part, and before the
  // end of which the state is kept.
  EXPECT_LE(misses, 2);
  EXPECT_LE(FedTokens(), 1.05 * (kPrefix + kRequests * kTail));
  EXPECT_EQ(Metric("mmfree_prefix_cache_hits_total{"), kRequests - 1);
  ExpectIdle();

  StartServer({"--prefix_cache_mb=0"});
  for (const size_t i : {0, 1, 500, 999}) {
    const Generation alone = Generate(Request(prompts[i], 1));
    EXPECT_EQ(alone.token_ids, outputs[i]) << i;
    EXPECT_EQ(alone.finished.usage().cached_tokens(), 0);
  }
}

TEST_F(PrefixCacheTest, APromptThatPartsAnywhereHitsUpToTheLastCommonState) {
  StartServer();
  std::mt19937 random(2);
  const Tokens first = RandomTokens(700, &random);
  EXPECT_EQ(Cached(Request(first, 1)), 0);
  // The same again, whole, longer and shorter.
  EXPECT_EQ(Cached(Request(first, 1)), 699);
  EXPECT_EQ(Cached(Request(Join(first, {5, 6, 7}), 1)), 699);
  EXPECT_EQ(Cached(Request(Tokens(first.begin(), first.begin() + 600), 1)), 512);
  for (int i = 0; i < 20; ++i) {
    const size_t common = 1 + random() % 690;
    const auto parted = [&] {
      Tokens prompt(first.begin(), first.begin() + static_cast<ptrdiff_t>(common));
      prompt.push_back(first[common] == 9 ? 10 : 9);
      return Join(prompt, RandomTokens(40, &random));
    };
    // Until here there are the states after every 256 tokens, and where others parted before.
    EXPECT_GE(Cached(Request(parted(), 1)), static_cast<int64_t>(common / 256 * 256));
    const int64_t cached = Cached(Request(parted(), 1));
    EXPECT_LE(cached, static_cast<int64_t>(common) + 1);
    EXPECT_GT(cached, static_cast<int64_t>(common) - kLeastGain);
  }
  // Shifted by one token it is another prompt.
  EXPECT_EQ(Cached(Request(Join({3}, first), 1)), 0);
  const Generation started = Generate(Request(first, 1));
  EXPECT_EQ(started.started.cached_tokens(), 699);
}

TEST_F(PrefixCacheTest, NoByteDependsOnTheCache) {
  std::mt19937 random(3);
  std::vector<v1::GenerateRequest> requests;
  std::vector<Tokens> prompts;
  for (int i = 0; i < 40; ++i) {
    Tokens prompt;
    if (!prompts.empty() && random() % 5 != 0) {
      prompt = prompts[random() % prompts.size()];
      prompt.resize(1 + random() % prompt.size());
    }
    // One is so long that its states drive all others out of the smallest cache.
    prompt = Join(prompt, RandomTokens(i == 20 ? 1500 : 1 + random() % 50, &random));
    if (i != 20) prompts.push_back(prompt);
    requests.push_back(Request(prompt, 1 + random() % 8, random()));
    if (i % 4 == 0) requests.back().mutable_sampling()->set_repetition_penalty(1.3f);
    if (i % 7 == 0) requests.back().mutable_response()->set_prompt_logprobs(true);
  }
  const auto outputs = [&](const std::vector<std::string>& flags) {
    StartServer(flags);
    std::vector<std::pair<Tokens, std::vector<float>>> all;
    for (const v1::GenerateRequest& request : requests) {
      const Generation generation = Generate(request);
      EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
      all.emplace_back(generation.token_ids, Logprobs(generation));
    }
    return all;
  };
  const auto expected = outputs({"--prefix_cache_mb=0"});
  EXPECT_EQ(Metric("mmfree_prefix_cache_hits_total{"), 0);
  EXPECT_EQ(outputs({}), expected);
  EXPECT_GT(Metric("mmfree_prefix_cache_hits_total{"), 5);
  EXPECT_EQ(outputs({"--prefix_cache_interval=17", "--prefill_chunk=7"}), expected);
  // About eighty states of 12 KiB.
  EXPECT_EQ(outputs({"--prefix_cache_mb=1", "--prefix_cache_interval=16"}), expected);
  EXPECT_GT(Metric("mmfree_prefix_cache_evictions_total"), 0);
  EXPECT_LE(Metric("mmfree_prefix_cache_bytes"), 1 << 20);
}

TEST_F(PrefixCacheTest, SaltsDoNotShare) {
  StartServer();
  std::mt19937 random(4);
  v1::GenerateRequest request = Request(RandomTokens(100, &random), 1);
  for (const char* salt : {"", "a", "b", "ab"}) {
    request.set_cache_salt(salt);
    EXPECT_EQ(Cached(request), 0) << salt;
    EXPECT_EQ(Cached(request), 99) << salt;
  }
}

TEST_F(PrefixCacheTest, ClientsThatGiveUpWhileTheyFeedOrWaitHoldUpNobody) {
  StartServer({"--max_queue=2000", "--prefill_chunk=32", "--max_sessions=16"});
  std::mt19937 random(5);
  const Tokens prefix = RandomTokens(1500, &random);
  std::vector<std::unique_ptr<Open>> open;
  for (int i = 0; i < 60; ++i) {
    open.push_back(Start(Request(Join(prefix, RandomTokens(20, &random)), 2)));
  }
  // Most likely the first is being fed, and others wait for it. Every second one goes away.
  for (size_t i = 0; i < open.size(); i += 2) open[i]->context.TryCancel();
  for (size_t i = 0; i < open.size(); ++i) {
    int64_t cached = -1;
    if (i % 2 == 1) {
      EXPECT_EQ(ReadToEnd(open[i].get(), &cached).size(), 2u);
      continue;
    }
    v1::GenerateResponse event;
    while (open[i]->reader->Read(&event)) {
    }
    open[i]->reader->Finish();
  }
  ExpectIdle();
}

TEST_F(PrefixCacheTest, SessionsAndCandidatesStartFromIt) {
  StartServer();
  const auto sessions = v1::SessionService::NewStub(channel_);
  std::mt19937 random(6);
  const Tokens prompt = RandomTokens(100, &random);
  EXPECT_EQ(Cached(Request(prompt, 4)), 0);
  const Generation plain = Generate(Request(prompt, 4));

  const auto create = [&](const std::string& id, const Tokens& system_prompt) {
    grpc::ClientContext context;
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    if (!system_prompt.empty()) {
      request.mutable_token_ids()->mutable_ids()->Add(system_prompt.begin(), system_prompt.end());
    }
    v1::CreateSessionResponse response;
    EXPECT_TRUE(sessions->CreateSession(&context, request, &response).ok());
  };
  create("first", {});
  v1::GenerateRequest turn = Request(prompt, 4);
  turn.set_session_id("first");
  const Generation first = Generate(turn);
  EXPECT_EQ(first.finished.usage().cached_tokens(), 99);
  EXPECT_EQ(first.token_ids, plain.token_ids);
  // Its next turn goes on from its own state.
  v1::GenerateRequest next = Request(prompt, 4);
  next.set_session_id("first");
  const Generation second = Generate(next);
  EXPECT_EQ(second.finished.usage().cached_tokens(), 0);
  EXPECT_EQ(second.token_ids,
            Generate(Request(Join(Join(prompt, first.token_ids), prompt), 4)).token_ids);

  const double before = FedTokens();
  create("system", prompt);
  EXPECT_EQ(FedTokens() - before, 1);
  v1::GenerateRequest candidates = Request(prompt, 4);
  candidates.set_candidates(3);
  const Generation several = Generate(candidates);
  EXPECT_TRUE(several.status.ok());
  EXPECT_EQ(several.finished.usage().cached_tokens(), 99);
}

}  // namespace
}  // namespace mmfree
