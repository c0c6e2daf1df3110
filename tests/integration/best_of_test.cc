// best_of over a real server: the same bytes as ranking the candidates by hand.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/integration/live_server.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

// All that was sent of one candidate.
struct Output {
  std::string text;
  std::vector<int32_t> token_ids;
  std::string logprobs;
  v1::GenerationFinished finished;
};

std::vector<Output> OutputsOf(const Generation& generation, size_t candidates) {
  std::vector<Output> outputs(candidates);
  for (const v1::GenerateResponse& event : generation.events) {
    if (event.has_delta()) {
      Output& output = outputs.at(event.delta().candidate());
      output.text += event.delta().text();
      output.token_ids.insert(output.token_ids.end(), event.delta().token_ids().begin(),
                              event.delta().token_ids().end());
      for (const v1::TokenLogprob& logprob : event.delta().logprobs()) {
        output.logprobs += logprob.SerializeAsString();
      }
    } else if (event.has_finished()) {
      outputs.at(event.finished().candidate()).finished = event.finished();
    }
  }
  return outputs;
}

// What the two ways of asking have in common.
std::string Comparable(v1::GenerationFinished finished) {
  finished.clear_candidate();
  finished.clear_timings();
  finished.mutable_usage()->clear_cached_tokens();
  finished.mutable_usage()->clear_discarded_tokens();
  return finished.SerializeAsString();
}

class BestOfServerTest : public LiveServer {
 protected:
  void SetUp() override { StartServer(); }

  static v1::GenerateRequest Request(uint64_t seed) {
    v1::GenerateRequest request = GreedyRequest("Once upon a time there was", 24);
    request.mutable_sampling()->set_temperature(1.0f);
    request.mutable_sampling()->set_seed(seed);
    request.mutable_response()->set_logprobs(true);
    return request;
  }

  // `request` with best_of = made and candidates = sent gives the top of candidates = made.
  void ExpectTheTop(v1::GenerateRequest request, uint32_t made, uint32_t sent) {
    request.set_candidates(made);
    const Generation all = Generate(request);
    ASSERT_TRUE(all.status.ok()) << all.status.error_message();
    std::vector<Output> expected = OutputsOf(all, made);
    std::stable_sort(expected.begin(), expected.end(), [](const Output& a, const Output& b) {
      return a.finished.cumulative_logprob() > b.finished.cumulative_logprob();
    });
    int64_t discarded = 0;
    for (uint32_t i = sent; i < made; ++i) {
      discarded += expected[i].finished.usage().completion_tokens();
    }
    request.set_candidates(sent);
    request.set_best_of(made);
    const Generation best = Generate(request);
    ASSERT_TRUE(best.status.ok()) << best.status.error_message();
    const std::vector<Output> outputs = OutputsOf(best, sent);
    for (uint32_t i = 0; i < sent; ++i) {
      EXPECT_EQ(outputs[i].text, expected[i].text) << i;
      EXPECT_EQ(outputs[i].token_ids, expected[i].token_ids) << i;
      EXPECT_EQ(outputs[i].logprobs, expected[i].logprobs) << i;
      EXPECT_EQ(Comparable(outputs[i].finished), Comparable(expected[i].finished)) << i;
      EXPECT_EQ(outputs[i].finished.usage().discarded_tokens(), i == 0 ? discarded : 0);
    }
    // One after the other, the best first.
    uint32_t last = 0;
    for (const v1::GenerateResponse& event : best.events) {
      if (!event.has_delta() && !event.has_finished()) continue;
      const uint32_t candidate =
          event.has_delta() ? event.delta().candidate() : event.finished().candidate();
      EXPECT_TRUE(candidate == last || candidate == last + 1);
      last = candidate;
    }
    EXPECT_EQ(last, sent - 1);
  }
};

TEST_F(BestOfServerTest, SendsTheTopOfTheSameCandidates) {
  for (const uint64_t seed : {1, 2, 3}) ExpectTheTop(Request(seed), 5, 2);
  ExpectTheTop(Request(4), 17, 1);
  ExpectTheTop(Request(5), 6, 5);
}

TEST_F(BestOfServerTest, WithStopStringsPenaltiesConstraintsAndBothDistributions) {
  v1::GenerateRequest request = Request(6);
  request.mutable_stopping()->add_stop_strings("e");
  request.mutable_sampling()->set_frequency_penalty(1.0f);
  request.mutable_sampling()->set_top_p(0.9f);
  request.set_speculative_tokens(4);
  ExpectTheTop(request, 5, 2);
  request.mutable_response()->set_logprob_mode(v1::LOGPROB_MODE_SAMPLING);
  request.mutable_response()->set_top_logprobs(3);
  ExpectTheTop(request, 5, 2);
  v1::GenerateRequest constrained = Request(7);
  constrained.mutable_constraint()->set_regex("(North|South|East|West){2}-[0-9]{3}");
  ExpectTheTop(constrained, 5, 2);
  // All equal: the order is that of their numbers.
  v1::GenerateRequest greedy = Request(8);
  greedy.mutable_sampling()->set_temperature(0.0f);
  ExpectTheTop(greedy, 4, 2);
}

TEST_F(BestOfServerTest, RanksByTheDistributionAskedForWithoutSendingLogprobs) {
  for (const v1::LogprobMode mode : {v1::LOGPROB_MODE_MODEL, v1::LOGPROB_MODE_SAMPLING}) {
    v1::GenerateRequest request = Request(9);
    request.mutable_sampling()->set_top_k(20);
    request.mutable_response()->set_logprob_mode(mode);
    request.set_best_of(7);
    const Generation with = Generate(request);
    request.mutable_response()->set_logprobs(false);
    const Generation without = Generate(request);
    ASSERT_TRUE(without.status.ok()) << without.status.error_message();
    EXPECT_EQ(without.token_ids, with.token_ids);
    EXPECT_EQ(without.finished.cumulative_logprob(), with.finished.cumulative_logprob());
    EXPECT_LT(without.finished.cumulative_logprob(), 0.0);
    for (const v1::GenerateResponse& event : without.events) {
      EXPECT_EQ(event.delta().logprobs_size(), 0);
    }
  }
}

TEST_F(BestOfServerTest, AVanishedClientFreesTheRows) {
  v1::GenerateRequest request = EndlessRequest();
  request.mutable_stopping()->set_max_new_tokens(40'000);
  request.set_best_of(6);
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, request);
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_TRUE(event.has_started());
  ASSERT_TRUE(AwaitLoad([](const auto& load) { return load.running() == 6; }));
  context.TryCancel();
  EXPECT_FALSE(reader->Read(&event)) << "something was sent before all were finished";
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectIdle();
}

TEST_F(LiveServer, MoreThanCanEverBeAdmittedIsRefusedNamingBestOf) {
  StartServer({"--max_sessions=2", "--max_queue=3"});
  v1::GenerateRequest request = GreedyRequest("Once", 4);
  request.set_candidates(2);
  request.set_best_of(6);
  const Generation refused = Generate(request);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("best_of"));
  request.set_best_of(5);
  EXPECT_TRUE(Generate(request).status.ok());
}

}  // namespace
}  // namespace mmfree
