// Two real servers on the demo model, one on the GPU and one on the CPU: what they are asked gives
// the same bytes, and sessions move between them.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/skip_without_gpu.h"
#include "tests/integration/session_fixture.h"

namespace mmfree {
namespace {

class Server final : public SessionFixture {
 public:
  using SessionFixture::Create;
  using SessionFixture::Export;
  using SessionFixture::Generate;
  using SessionFixture::Import;
  using SessionFixture::Metric;
  using SessionFixture::Start;

 private:
  void TestBody() override {}
};

class CudaServerTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    gpu_.Start({"--backend=cuda"});
    cpu_.Start({"--backend=cpu"});
  }

  Server gpu_;
  Server cpu_;
};

v1::GenerateRequest Request(const std::string& text, uint32_t max_new_tokens) {
  v1::GenerateRequest request = GreedyRequest(text, max_new_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

// Request number `i`, with what samples within rows and what is drawn with options.
v1::GenerateRequest MixedRequest(int i) {
  const bool repeats = i % 2 == 0;
  v1::GenerateRequest request = Request(
      repeats ? "The wolf and the fox, the wolf and the fox, the wolf and the" : "Once upon a time",
      16 + static_cast<uint32_t>(i));
  v1::SamplingOptions* const sampling = request.mutable_sampling();
  sampling->set_temperature(i % 3 == 0 ? 0.0f : 0.3f + 0.1f * static_cast<float>(i % 5));
  sampling->set_seed(static_cast<uint64_t>(i));
  if (i % 4 == 1) sampling->set_top_p(0.9f);
  if (i % 4 == 2) sampling->set_repetition_penalty(1.1f);
  const bool constrained = i % 5 == 4;
  if (constrained) request.mutable_constraint()->set_regex("( [a-z]+){3,20}\\.");
  if (i % 4 == 3) request.mutable_stopping()->set_min_new_tokens(9);
  if (i % 6 == 5) request.mutable_stopping()->add_stop_strings("e ");
  request.mutable_stopping()->set_ignore_eos(i % 4 != 3 && !constrained);
  request.set_speculative_tokens(static_cast<uint32_t>(i % 3 == 1 ? 0 : 1 + i % 16));
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(static_cast<uint32_t>(i % 4));
  request.mutable_response()->set_prompt_logprobs(i % 3 == 2);
  request.mutable_response()->set_echo(i % 6 == 2);
  request.mutable_response()->set_return_state(i % 4 == 0 || i % 6 == 5);
  return request;
}

// All that was sent, however it was cut into events.
std::string Sent(const Generation& generation) {
  std::string all = absl::StrCat(generation.status.error_code(), generation.text);
  std::string prompt;
  for (const v1::GenerateResponse& event : generation.events) {
    for (const v1::TokenLogprob& logprob : event.delta().logprobs()) {
      absl::StrAppend(&all, logprob.SerializeAsString());
    }
    absl::StrAppend(&prompt, event.prompt().text());
    for (const v1::TokenLogprob& logprob : event.prompt().logprobs()) {
      absl::StrAppend(&prompt, logprob.SerializeAsString());
    }
  }
  v1::GenerationFinished finished = generation.finished;
  finished.clear_timings();
  // Whether an earlier request's states are found depends on which came first.
  finished.mutable_usage()->clear_cached_tokens();
  return absl::StrCat(prompt, all, finished.SerializeAsString());
}

TEST_F(CudaServerTest, RequestsOfAllKindsTogetherGiveTheBytesOfTheCpu) {
  constexpr int kRequests = 36;
  std::vector<Generation> together(kRequests);
  std::vector<std::thread> threads;
  for (int i = 0; i < kRequests; ++i) {
    threads.emplace_back([&, i] { together[i] = gpu_.Generate(MixedRequest(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(together[i].status.ok()) << i << ": " << together[i].status.error_message();
    EXPECT_EQ(Sent(together[i]), Sent(cpu_.Generate(MixedRequest(i)))) << i;
  }
}

TEST_F(CudaServerTest, SpeculationChangesNoByteAndSavesSteps) {
  uint64_t steps[2];
  std::string sent[2];
  for (const bool on : {false, true}) {
    v1::GenerateRequest request = Request("a b c d a b c d a b c d", 120);
    request.mutable_sampling()->add_allowed_token_ids(300);
    request.set_speculative_tokens(on ? 8 : 0);
    constexpr const char* kSteps = "mmfree_step_duration_seconds_count{kind=\"decode\"";
    const double before = gpu_.Metric(kSteps);
    const Generation generation = gpu_.Generate(request);
    ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
    steps[on] = static_cast<uint64_t>(gpu_.Metric(kSteps) - before);
    sent[on] = Sent(generation);
  }
  EXPECT_EQ(sent[0], sent[1]);
  EXPECT_GT(gpu_.Metric("mmfree_speculative_accepted_tokens_total{"), 90);
  EXPECT_LT(steps[1], steps[0] / 3);
}

// A turn of one session on the CPU and of one that moves: to the GPU, back and so on.
TEST_F(CudaServerTest, ASessionThatMovesBetweenBackendsIsTheOneThatStays) {
  const std::string stays = cpu_.Create();
  std::string moves = gpu_.Create();
  std::string before;  // the first turn's output, where its stop string comes from
  for (int turn = 0; turn < 8; ++turn) {
    Server& host = turn % 2 == 0 ? gpu_ : cpu_;
    Server& next = turn % 2 == 0 ? cpu_ : gpu_;
    v1::GenerateRequest request =
        Request(turn == 0 ? "Once upon a time" : " The wolf and the fox and the wolf", 24);
    request.mutable_sampling()->set_temperature(turn % 3 == 0 ? 0.0f : 0.9f);
    request.mutable_sampling()->set_seed(static_cast<uint64_t>(turn));
    if (turn % 3 == 1) request.mutable_sampling()->set_top_k(20);
    if (turn % 4 > 1) request.set_speculative_tokens(6);
    if (turn == 7) request.mutable_stopping()->set_max_new_tokens(0);
    request.mutable_response()->set_logprobs(true);
    std::string sent[2];
    v1::SessionCheckpoint left[2];
    for (const bool moving : {false, true}) {
      Server& server = moving ? host : cpu_;
      request.set_session_id(moving ? moves : stays);
      const Generation generation = server.Generate(request);
      ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
      sent[moving] = Sent(generation);
      left[moving] = server.Export(request.session_id());
    }
    EXPECT_EQ(sent[0], sent[1]) << "turn " << turn;
    EXPECT_EQ(left[0].body(), left[1].body()) << "turn " << turn;
    const grpc::Status imported = next.Import(left[1], &moves);
    ASSERT_TRUE(imported.ok()) << imported.error_message();
  }
}

// What stop strings leave of a turn: the state where the string began, wherever it is cut.
TEST_F(CudaServerTest, StopStringsLeaveTheSameContextOnBoth) {
  v1::GenerateRequest first = Request("Once upon a time", 40);
  first.mutable_sampling()->set_temperature(1.0f);
  first.mutable_sampling()->set_seed(3);
  const std::string whole = cpu_.Generate(first).text;
  ASSERT_GT(whole.size(), 60u);
  for (const size_t begin : {0, 9, 21, 22, 23, 40}) {
    v1::GenerateRequest stopped = first;
    stopped.mutable_stopping()->add_stop_strings(whole.substr(begin, 1 + begin % 5));
    stopped.mutable_stopping()->add_stop_strings("never in the text");
    stopped.set_speculative_tokens(4);
    v1::GenerateRequest after = Request(" and then", 8);
    std::array<std::string, 2> sent;
    std::array<std::string, 2> left;
    for (const bool on_gpu : {false, true}) {
      Server& server = on_gpu ? gpu_ : cpu_;
      const std::string id = server.Create();
      stopped.set_session_id(id);
      after.set_session_id(id);
      const Generation turn = server.Generate(stopped);
      ASSERT_EQ(turn.finished.finish_reason(), v1::FINISH_REASON_STOP_STRING) << begin;
      left[on_gpu] = server.Export(id).body();
      sent[on_gpu] = Sent(turn) + Sent(server.Generate(after));
    }
    EXPECT_EQ(sent[0], sent[1]) << begin;
    EXPECT_EQ(left[0], left[1]) << begin;
  }
}

}  // namespace
}  // namespace mmfree
