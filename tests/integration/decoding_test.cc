// Decoding control over a real server: every field of SamplingOptions, and what is said about
// tokens.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "tests/integration/live_server.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::SizeIs;

v1::GenerateRequest SampledRequest(uint64_t seed, uint32_t max_new_tokens = 24) {
  v1::GenerateRequest request = GreedyRequest("Once upon a time there was", max_new_tokens);
  request.mutable_sampling()->set_temperature(1.0f);
  request.mutable_sampling()->set_seed(seed);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

class DecodingTest : public LiveServer {
 protected:
  void SetUp() override { StartServer(); }

  std::vector<int32_t> Ids(const v1::GenerateRequest& request) const {
    const Generation generation = Generate(request);
    EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
    return generation.token_ids;
  }
};

TEST_F(DecodingTest, FiltersThatKeepOneTokenAreGreedy) {
  v1::GenerateRequest greedy = SampledRequest(1);
  greedy.mutable_sampling()->set_temperature(0.0f);
  const std::vector<int32_t> expected = Ids(greedy);
  ASSERT_THAT(expected, SizeIs(24));
  for (const auto& set : std::vector<std::function<void(v1::SamplingOptions*)>>{
           [](auto* s) { s->set_top_k(1); },
           [](auto* s) { s->set_top_p(0.0f); },
           [](auto* s) { s->set_min_p(1.0f); },
       }) {
    v1::GenerateRequest request = SampledRequest(5);
    set(request.mutable_sampling());
    EXPECT_EQ(Ids(request), expected);
  }
}

TEST_F(DecodingTest, OptionsThatChangeNothingLeaveTheTokensAsTheyAre) {
  const std::vector<int32_t> expected = Ids(SampledRequest(3));
  for (const auto& set : std::vector<std::function<void(v1::SamplingOptions*)>>{
           [](auto* s) { s->set_top_k(1'000'000); },
           [](auto* s) { (*s->mutable_logit_bias())[7] = 1e-30f; },
           [](auto* s) { s->set_min_p(1e-20f); },
       }) {
    v1::GenerateRequest request = SampledRequest(3);
    set(request.mutable_sampling());
    EXPECT_EQ(Ids(request), expected);
  }
}

TEST_F(DecodingTest, AllowedBannedAndBiasedTokens) {
  const std::set<int32_t> allowed = {300, 301, 302, 500};
  v1::GenerateRequest request = SampledRequest(2);
  for (const int32_t id : allowed) request.mutable_sampling()->add_allowed_token_ids(id);
  EXPECT_THAT(Ids(request),
              Each(testing::Truly([&](int32_t id) { return allowed.count(id) > 0; })));
  request.mutable_sampling()->add_banned_token_ids(300);
  request.mutable_sampling()->add_banned_token_ids(302);
  (*request.mutable_sampling()->mutable_logit_bias())[500] = -100.0f;
  EXPECT_THAT(Ids(request), Each(301));
  v1::GenerateRequest biased = SampledRequest(2);
  (*biased.mutable_sampling()->mutable_logit_bias())[777] = 100.0f;
  EXPECT_THAT(Ids(biased), Each(777));
}

TEST_F(DecodingTest, PenaltiesDiscourageRepeats) {
  const auto distinct = [this](const v1::GenerateRequest& request) {
    const std::vector<int32_t> ids = Ids(request);
    return std::set<int32_t>(ids.begin(), ids.end()).size();
  };
  v1::GenerateRequest plain = SampledRequest(1, 60);
  plain.mutable_sampling()->set_temperature(0.0f);
  const size_t before = distinct(plain);
  for (const auto& set : std::vector<std::function<void(v1::SamplingOptions*)>>{
           [](auto* s) { s->set_repetition_penalty(1.5f); },
           [](auto* s) { s->set_frequency_penalty(1.5f); },
           [](auto* s) { s->set_presence_penalty(2.0f); },
       }) {
    v1::GenerateRequest request = plain;
    set(request.mutable_sampling());
    EXPECT_GT(distinct(request), before);
  }
  v1::GenerateRequest off = plain;
  off.mutable_sampling()->set_repetition_penalty(1.5f);
  off.mutable_sampling()->set_repetition_window(0);
  EXPECT_EQ(Ids(off), Ids(plain));
}

v1::GenerateRequest MixedRequest(int i) {
  v1::GenerateRequest request = SampledRequest(static_cast<uint64_t>(i), 20);
  v1::SamplingOptions* const sampling = request.mutable_sampling();
  if (i % 2 == 0) sampling->set_top_k(40);
  if (i % 3 == 0) sampling->set_top_p(0.9f);
  if (i % 4 == 0) sampling->set_repetition_penalty(1.2f);
  if (i % 5 == 0) sampling->set_typical_p(0.8f);
  if (i % 7 == 0) sampling->set_min_p(0.05f);
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(static_cast<uint32_t>(i % 4));
  if (i % 2 == 1) request.mutable_response()->set_logprob_mode(v1::LOGPROB_MODE_SAMPLING);
  return request;
}

std::string Logprobs(const Generation& generation) {
  std::string all;
  for (const v1::GenerateResponse& event : generation.events) {
    for (const v1::TokenLogprob& logprob : event.delta().logprobs()) {
      all += logprob.SerializeAsString();
    }
  }
  return all;
}

TEST_F(DecodingTest, SameTokensAndLogprobsInEveryBatchAndOnEveryInstructionSet) {
  constexpr int kRequests = 24;
  std::vector<Generation> alone;
  for (int i = 0; i < kRequests; ++i) {
    alone.push_back(Generate(MixedRequest(i)));
    ASSERT_TRUE(alone[i].status.ok()) << alone[i].status.error_message();
  }
  std::vector<Generation> together(kRequests);
  std::vector<std::thread> threads;
  for (int i = 0; i < kRequests; ++i) {
    threads.emplace_back([&, i] { together[i] = Generate(MixedRequest(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kRequests; ++i) {
    EXPECT_EQ(together[i].token_ids, alone[i].token_ids) << i;
    EXPECT_EQ(Logprobs(together[i]), Logprobs(alone[i])) << i;
  }
  server_.reset();
  StartServer({"--backend=cpu", "--cpu_isa=scalar"});
  for (int i = 0; i < 6; ++i) {
    const Generation scalar = Generate(MixedRequest(i));
    EXPECT_EQ(scalar.token_ids, alone[i].token_ids) << i;
    EXPECT_EQ(Logprobs(scalar), Logprobs(alone[i])) << i;
  }
}

TEST_F(DecodingTest, TopLogprobsAreTheLikeliestAndAgreeWithTheirToken) {
  v1::GenerateRequest request = SampledRequest(4);
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(20);
  const Generation generation = Generate(request);
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  int tokens = 0;
  for (const v1::GenerateResponse& event : generation.events) {
    for (const v1::TokenLogprob& logprob : event.delta().logprobs()) {
      ++tokens;
      ASSERT_EQ(logprob.top_size(), 20);
      for (int i = 0; i < 20; ++i) {
        const v1::TokenLogprob::Alternative& top = logprob.top(i);
        EXPECT_LE(top.logprob(), logprob.top(std::max(0, i - 1)).logprob());
        if (top.token_id() == logprob.token_id()) {
          EXPECT_EQ(top.logprob(), logprob.logprob());
        }
      }
      EXPECT_LE(logprob.logprob(), logprob.top(0).logprob());
    }
  }
  EXPECT_EQ(tokens, 24);
}

TEST_F(DecodingTest, StopStringsEndTheTextWhereverTokensAreCut) {
  v1::GenerateRequest request = SampledRequest(6, 60);
  const Generation whole = Generate(request);
  ASSERT_TRUE(whole.status.ok()) << whole.status.error_message();
  ASSERT_GT(whole.text.size(), 100u);
  for (const size_t start : {1, 20, 21, 22, 23, 50}) {
    const std::string stop = whole.text.substr(start, 13);
    const size_t first = whole.text.find(stop);
    for (const bool include : {false, true}) {
      v1::GenerateRequest stopping = request;
      stopping.mutable_stopping()->add_stop_strings("not in the text");
      stopping.mutable_stopping()->add_stop_strings(stop);
      stopping.mutable_stopping()->set_include_stop(include);
      const Generation stopped = Generate(stopping);
      ASSERT_TRUE(stopped.status.ok()) << stopped.status.error_message();
      EXPECT_EQ(stopped.text, whole.text.substr(0, first + (include ? stop.size() : 0)));
      EXPECT_EQ(stopped.finished.finish_reason(), v1::FINISH_REASON_STOP_STRING);
      EXPECT_EQ(stopped.finished.stop_string(), stop);
      // The tokens are those of the whole, and none was made beyond the match.
      const size_t tokens = stopped.token_ids.size();
      EXPECT_EQ(stopped.finished.usage().completion_tokens(), static_cast<int64_t>(tokens));
      EXPECT_TRUE(
          std::equal(stopped.token_ids.begin(), stopped.token_ids.end(), whole.token_ids.begin()));
      const std::vector<int32_t> one_less(whole.token_ids.begin(),
                                          whole.token_ids.begin() + static_cast<int>(tokens) - 1);
      EXPECT_EQ(Detokenize(one_less, true).find(stop), std::string::npos);
    }
  }
  v1::GenerateRequest later = request;
  later.mutable_stopping()->add_stop_strings(" ");
  later.mutable_stopping()->set_min_new_tokens(30);
  const Generation stopped = Generate(later);
  EXPECT_GE(stopped.token_ids.size(), 30u);
  EXPECT_LT(stopped.token_ids.size(), 60u);
}

TEST_F(DecodingTest, EchoAndPromptLogprobsAreThoseOfScore) {
  const std::string text = "The old woman lived in a small house by the wood.";
  v1::GenerateRequest request = GreedyRequest(text, 3);
  request.mutable_response()->set_echo(true);
  request.mutable_response()->set_prompt_logprobs(true);
  request.mutable_response()->set_top_logprobs(5);
  const Generation generation = Generate(request);
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  v1::ScoreRequest score;
  score.add_inputs()->set_text(text);
  grpc::ClientContext context;
  v1::ScoreResponse scored;
  ASSERT_TRUE(inference_->Score(&context, score, &scored).ok());
  const v1::ScoreResult& result = scored.results(0);
  std::string echoed;
  int position = 0;
  for (const v1::GenerateResponse& event : generation.events) {
    echoed += event.prompt().text();
    for (const v1::TokenLogprob& logprob : event.prompt().logprobs()) {
      EXPECT_EQ(logprob.token_id(), result.token_ids(position));
      EXPECT_EQ(logprob.logprob(), position == 0 ? 0.0f : result.logprobs(position - 1));
      ASSERT_EQ(logprob.top_size(), position == 0 ? 0 : 5);
      for (int i = 0; i < logprob.top_size(); ++i) {
        if (i == 0) {
          EXPECT_EQ(logprob.top(i).token_id(), result.argmax(position - 1));
        }
        if (logprob.top(i).token_id() == logprob.token_id()) {
          EXPECT_EQ(logprob.top(i).logprob(), logprob.logprob());
        }
      }
      ++position;
    }
  }
  EXPECT_EQ(position, result.token_ids_size());
  EXPECT_EQ(echoed, text);
  EXPECT_EQ(generation.token_ids, Generate(GreedyRequest(text, 3)).token_ids);
}

TEST_F(DecodingTest, SpeculationChangesNothingThatIsSent) {
  const auto request = [](int i, bool speculate) {
    v1::GenerateRequest request = MixedRequest(i);
    request.set_text("the wolf and the fox, the wolf and the fox, the wolf and the");
    request.mutable_stopping()->set_max_new_tokens(40);
    if (i % 3 == 0) request.mutable_sampling()->set_temperature(0.0f);
    if (i % 4 == 1) request.mutable_stopping()->add_stop_strings("fox, the");
    if (i % 4 == 3) request.mutable_stopping()->set_min_new_tokens(7);
    if (i % 5 == 2) request.set_candidates(3);
    request.set_speculative_tokens(speculate ? 1 + i % 16 : 0);
    return request;
  };
  const auto sent = [](const Generation& generation) {
    std::string all = generation.text + Logprobs(generation);
    for (const v1::GenerateResponse& event : generation.events) {
      if (!event.has_finished()) continue;
      v1::GenerationFinished finished = event.finished();
      finished.clear_timings();
      // The second of two equal prompts finds the first one's states.
      finished.mutable_usage()->clear_cached_tokens();
      all += finished.SerializeAsString();
    }
    return all;
  };
  constexpr const char* kAccepted = "mmfree_speculative_accepted_tokens_total{";
  for (int i = 0; i < 8; ++i) {
    // Of several candidates the events come in any order.
    const bool several = request(i, false).candidates() > 1;
    const Generation plain = Generate(request(i, false));
    const Generation speculative = Generate(request(i, true));
    ASSERT_TRUE(plain.status.ok()) << plain.status.error_message();
    ASSERT_TRUE(speculative.status.ok()) << speculative.status.error_message();
    if (several) {
      std::vector<int32_t> ids[2][3];
      for (const bool on : {false, true}) {
        for (const v1::GenerateResponse& event : (on ? speculative : plain).events) {
          std::vector<int32_t>& to = ids[on][event.delta().candidate()];
          to.insert(to.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
        }
      }
      for (const int candidate : {0, 1, 2}) EXPECT_EQ(ids[0][candidate], ids[1][candidate]);
    } else {
      EXPECT_EQ(sent(speculative), sent(plain)) << i;
    }
  }
  EXPECT_GT(Metric(kAccepted), 0);
  EXPECT_GE(Metric("mmfree_speculative_proposed_tokens_total{"), Metric(kAccepted));
  EXPECT_GT(Metric("mmfree_speculative_rows_total{"), 0);
}

TEST_F(DecodingTest, TheServersFlagIsTheDefaultOfSpeculativeTokens) {
  server_.reset();
  StartServer({"--speculative_tokens=8"});
  v1::GenerateRequest request = GreedyRequest("a b a b a b a b", 40);
  request.mutable_sampling()->add_allowed_token_ids(300);
  request.set_speculative_tokens(0);
  Ids(request);
  EXPECT_EQ(Metric("mmfree_speculative_accepted_tokens_total{"), 0);
  request.clear_speculative_tokens();
  Ids(request);
  EXPECT_GT(Metric("mmfree_speculative_accepted_tokens_total{"), 20);
}

TEST_F(DecodingTest, ConstrainedOutputsConformInEveryBatch) {
  const auto request = [](int i) {
    v1::GenerateRequest request = SampledRequest(static_cast<uint64_t>(i), 80);
    request.mutable_stopping()->set_ignore_eos(false);
    request.mutable_constraint()->set_regex("(North|South|East|West){2}-[0-9]{3}");
    if (i % 2 == 0) request.mutable_sampling()->set_top_p(0.9f);
    return request;
  };
  const std::regex expected("(North|South|East|West){2}-[0-9]{3}");
  constexpr int kRequests = 12;
  std::vector<Generation> alone;
  for (int i = 0; i < kRequests; ++i) {
    alone.push_back(Generate(request(i)));
    ASSERT_TRUE(alone[i].status.ok()) << alone[i].status.error_message();
    EXPECT_TRUE(std::regex_match(alone[i].text, expected)) << alone[i].text;
    EXPECT_EQ(alone[i].finished.finish_reason(), v1::FINISH_REASON_EOS);
  }
  std::vector<Generation> together(kRequests);
  std::vector<std::thread> threads;
  for (int i = 0; i < kRequests; ++i) {
    threads.emplace_back([&, i] { together[i] = Generate(request(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kRequests; ++i) EXPECT_EQ(together[i].token_ids, alone[i].token_ids) << i;
}

TEST_F(DecodingTest, AWrongConstraintIsRefusedByNameAndPlace) {
  const auto status = [this](const auto& set) {
    v1::GenerateRequest request = GreedyRequest("Once", 4);
    set(request.mutable_constraint());
    return Generate(request).status;
  };
  grpc::Status refused = status([](v1::Constraint* c) { c->set_regex("(a"); });
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), AllOf(HasSubstr("constraint.regex"), HasSubstr("at byte")));
  refused = status([](v1::Constraint* c) { c->set_grammar("root ::= root \"a\""); });
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("constraint.grammar"));
  refused = status([](v1::Constraint* c) { c->set_json_schema(R"({"not": {}})"); });
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("constraint.json_schema"));
}

}  // namespace
}  // namespace mmfree
