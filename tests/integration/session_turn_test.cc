// What the options of a turn leave in its session, and send of it.
#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/integration/session_fixture.h"

namespace mmfree {
namespace {

using SessionTurnTest = SessionFixture;

// The context that a session is at: the last 1024 tokens.
std::vector<int32_t> ContextOf(const v1::SessionCheckpoint& checkpoint) {
  v1::SessionCheckpointBody body;
  EXPECT_TRUE(body.ParseFromString(checkpoint.body()));
  std::vector<int32_t> context(body.last_token_ids().begin(), body.last_token_ids().end());
  context.insert(context.end(), body.pending_token_ids().begin(), body.pending_token_ids().end());
  return context;
}

// Whatever a stop string cuts, the context's text is what was sent, and the turns that follow are
// those of that context.
TEST_F(SessionTurnTest, AStopStringLeavesExactlyTheTextThatWasSent) {
  Start();
  std::mt19937 random(11);
  int within_a_token = 0;
  for (int round = 0; round < 16; ++round) {
    const std::string id = Create();
    v1::GenerateRequest first = Sampled(30);
    first.mutable_sampling()->set_seed(random() % 1000);
    const bool only_output = round % 4 == 0;
    first.set_text(only_output ? "" : "Once upon a time");
    const std::string whole = Generate(first).text;
    ASSERT_GT(whole.size(), 20u);
    // What some of the output, cut anywhere, is ended by.
    const size_t begin = only_output ? random() % 3 : random() % (whole.size() - 8);
    const std::string stop = whole.substr(begin, 1 + random() % 6);
    first.set_session_id(id);
    first.mutable_stopping()->add_stop_strings(stop);
    first.mutable_stopping()->set_include_stop(round % 3 == 0);
    const Generation turn = Generate(first);
    ASSERT_TRUE(turn.status.ok()) << turn.status.error_message();
    ASSERT_EQ(turn.finished.finish_reason(), v1::FINISH_REASON_STOP_STRING);
    EXPECT_EQ(turn.finished.stop_string(), stop);
    EXPECT_EQ(turn.text, whole.substr(0, whole.find(stop) + (round % 3 == 0 ? stop.size() : 0)));
    const std::vector<int32_t> context = ContextOf(Export(id));
    EXPECT_EQ(Detokenize(context, /*continuation=*/false), first.text() + turn.text);
    EXPECT_EQ(Get(id).token_count(), static_cast<int64_t>(context.size()));
    // The tokens that were sent as far as they go, unless the cut was within one.
    v1::TokenizeRequest tokenize;
    tokenize.set_text(first.text());
    const v1::TokenizeResponse input = Tokenize(tokenize);
    std::vector<int32_t> sent(input.token_ids().begin(), input.token_ids().end());
    sent.insert(sent.end(), turn.token_ids.begin(), turn.token_ids.end());
    const bool as_sent =
        context.size() <= sent.size() && std::equal(context.begin(), context.end(), sent.begin());
    if (!as_sent) ++within_a_token;
    // Goes on as one run over that context does.
    Mirror mirror = {id, context, 1};
    ExpectTurn(&mirror, " and then", 6);
    ExpectTurn(&mirror, "", 4);
    const std::string twin = Create();
    v1::GenerateRequest feed = Sampled(0);
    feed.set_session_id(twin);
    feed.mutable_token_ids()->mutable_ids()->Add(mirror.context.begin(), mirror.context.end());
    ASSERT_TRUE(Generate(feed).status.ok());
    v1::SessionCheckpointBody a, b;
    ASSERT_TRUE(a.ParseFromString(Export(id).body()) && b.ParseFromString(Export(twin).body()));
    EXPECT_EQ(a.payload(), b.payload());
    EXPECT_EQ(a.token_count(), b.token_count());
    EXPECT_EQ(a.last_token_ids_size(), b.last_token_ids_size());
  }
  EXPECT_GT(within_a_token, 2);
}

TEST_F(SessionTurnTest, AStopStringThatDoesNotComeChangesNothing) {
  Start();
  Mirror mirror = {Create(), {}, 0};
  const std::vector<int32_t> expected = Expect(&mirror, "Once upon a time", 12);
  v1::GenerateRequest request = Sampled(12);
  request.set_session_id(mirror.id);
  request.set_text("Once upon a time");
  request.mutable_stopping()->add_stop_strings("\u2603");
  request.mutable_stopping()->add_stop_strings("zzzz");
  EXPECT_EQ(Generate(request).token_ids, expected);
  ExpectTurn(&mirror, "", 5);
}

TEST_F(SessionTurnTest, AReturnedStateEndsWhereItsStopStringBegan) {
  Start({"--session_store=none"});
  v1::GenerateRequest request = Sampled(30);
  request.set_text("Once upon a time");
  const std::string whole = Generate(request).text;
  const std::string stop = whole.substr(whole.size() / 2, 3);
  request.mutable_stopping()->add_stop_strings(stop);
  request.mutable_response()->set_return_state(true);
  const Generation turn = Generate(request);
  ASSERT_TRUE(turn.status.ok()) << turn.status.error_message();
  const std::vector<int32_t> context = ContextOf(turn.finished.state());
  EXPECT_EQ(Detokenize(context, false), request.text() + whole.substr(0, whole.find(stop)));
}

TEST_F(SessionTurnTest, EachCandidatesStateEndsWhereItsOwnStopStringBegan) {
  Start({"--session_store=none"});
  v1::GenerateRequest request = Sampled(40);
  request.set_text("Once upon a time");
  request.set_candidates(4);
  for (const char* stop : {"e", ", ", "an"}) request.mutable_stopping()->add_stop_strings(stop);
  request.mutable_response()->set_return_state(true);
  std::map<uint32_t, std::string> texts;
  std::map<uint32_t, v1::GenerationFinished> finished;
  const Generation generation = Generate(request);
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  for (const v1::GenerateResponse& event : generation.events) {
    if (event.has_delta()) texts[event.delta().candidate()] += event.delta().text();
    if (event.has_finished()) finished[event.finished().candidate()] = event.finished();
  }
  ASSERT_EQ(finished.size(), 4u);
  for (const auto& [candidate, end] : finished) {
    EXPECT_EQ(end.finish_reason(), v1::FINISH_REASON_STOP_STRING);
    EXPECT_EQ(Detokenize(ContextOf(end.state()), false), request.text() + texts[candidate]);
  }
}

// What a turn sends of its input: that, and not what came before.
TEST_F(SessionTurnTest, EchoAndPromptLogprobsAreOfTheTurnsInput) {
  Start();
  Mirror mirror = {Create(), {}, 0};
  for (const std::string text : {"Once upon a time", " there  was", "", " a fox"}) {
    const size_t before = mirror.context.size();
    Mirror next = mirror;
    Expect(&next, text, 5);
    v1::GenerateRequest request = Sampled(5);
    request.set_session_id(mirror.id);
    if (!text.empty()) request.set_text(text);
    request.mutable_response()->set_echo(true);
    request.mutable_response()->set_prompt_logprobs(true);
    const Generation turn = Generate(request);
    ASSERT_TRUE(turn.status.ok()) << turn.status.error_message();
    std::string echoed;
    std::vector<int32_t> ids;
    std::vector<float> logprobs;
    for (const v1::GenerateResponse& event : turn.events) {
      echoed += event.prompt().text();
      for (const int32_t id : event.prompt().token_ids()) ids.push_back(id);
      for (const auto& logprob : event.prompt().logprobs()) logprobs.push_back(logprob.logprob());
    }
    EXPECT_EQ(echoed, text);
    const auto input = next.context.begin() + static_cast<ptrdiff_t>(before);
    EXPECT_EQ(ids, std::vector<int32_t>(input, next.context.end() - 5));
    // The same as over the whole context at once.
    if (!ids.empty()) {
      v1::ScoreRequest score;
      score.add_inputs()->mutable_token_ids()->mutable_ids()->Add(next.context.begin(),
                                                                  next.context.end() - 5);
      grpc::ClientContext context;
      v1::ScoreResponse scores;
      ASSERT_TRUE(inference_->Score(&context, score, &scores).ok());
      ASSERT_EQ(logprobs.size(), ids.size());
      for (size_t i = 0; i < ids.size(); ++i) {
        const size_t place = before + i;
        EXPECT_EQ(logprobs[i],
                  place == 0 ? 0.0f : scores.results(0).logprobs(static_cast<int>(place) - 1));
      }
    }
    mirror = next;
  }
}

}  // namespace
}  // namespace mmfree
