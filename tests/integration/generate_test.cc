// Generate, Score, Tokenize and Detokenize of a real server.
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

std::string ViolatedField(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::BadRequest bad_request;
  if (!details.ParseFromString(status.error_details()) || details.details_size() != 1 ||
      !details.details(0).UnpackTo(&bad_request) || bad_request.field_violations_size() == 0) {
    return "";
  }
  return bad_request.field_violations(0).field();
}

bool HasRetryDelay(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::RetryInfo retry;
  return details.ParseFromString(status.error_details()) && details.details_size() == 1 &&
         details.details(0).UnpackTo(&retry);
}

// Resident memory of a process, in bytes.
int64_t ResidentBytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  int64_t total = 0;
  int64_t resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

class GenerateTest : public LiveServer {
 protected:
  void SetUp() override { StartServer(); }
};

TEST_F(GenerateTest, StreamedTextEqualsTheDecodedTokens) {
  for (const char* prompt : {"", "Once upon a time", "\u65e5\u672c\u8a9e \U0001F600 "}) {
    v1::GenerateRequest request = GreedyRequest(prompt, 64);
    request.mutable_sampling()->set_temperature(1.5f);  // also reaches byte tokens
    request.mutable_sampling()->set_seed(11);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_response()->set_logprobs(true);
    const Generation generation = Generate(request);
    ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
    EXPECT_TRUE(generation.events.front().has_started());
    EXPECT_TRUE(generation.events.back().has_finished());
    EXPECT_EQ(generation.started.seed(), 11u);
    EXPECT_EQ(generation.token_ids.size(), 64u);
    EXPECT_EQ(generation.finished.finish_reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(generation.finished.usage().completion_tokens(), 64);
    EXPECT_EQ(generation.finished.usage().prompt_tokens(), generation.started.prompt_tokens());
    // After BOS alone the output starts the text, so its first leading space is none.
    const bool starts_text = std::string(prompt).empty();
    EXPECT_EQ(generation.text, Detokenize(generation.token_ids, !starts_text));
    double sum = 0.0;
    for (const v1::GenerateResponse& event : generation.events) {
      EXPECT_EQ(event.delta().logprobs_size(), event.delta().token_ids_size());
      for (const v1::TokenLogprob& logprob : event.delta().logprobs()) sum += logprob.logprob();
    }
    EXPECT_DOUBLE_EQ(generation.finished.cumulative_logprob(), sum);
  }
}

TEST_F(GenerateTest, TextAndItsTokensAreTheSameInput) {
  v1::TokenizeRequest tokenize;
  tokenize.set_text("The old woman");
  const v1::TokenizeResponse tokens = Tokenize(tokenize);
  v1::GenerateRequest with_ids = GreedyRequest("", 16);
  *with_ids.mutable_token_ids()->mutable_ids() = tokens.token_ids();
  const Generation from_text = Generate(GreedyRequest("The old woman", 16));
  const Generation from_ids = Generate(with_ids);
  ASSERT_TRUE(from_text.status.ok() && from_ids.status.ok());
  EXPECT_EQ(from_text.token_ids, from_ids.token_ids);
  EXPECT_EQ(from_text.text, from_ids.text);
}

TEST_F(GenerateTest, SeedDecidesAndAnAbsentOneIsReported) {
  v1::GenerateRequest request = GreedyRequest("Once", 24);
  request.mutable_sampling()->clear_temperature();
  const Generation first = Generate(request);
  ASSERT_TRUE(first.status.ok());
  request.mutable_sampling()->set_seed(first.started.seed());
  const Generation again = Generate(request);
  EXPECT_EQ(again.token_ids, first.token_ids);
  request.mutable_sampling()->set_seed(first.started.seed() + 1);
  EXPECT_NE(Generate(request).token_ids, first.token_ids);
}

TEST_F(GenerateTest, StopTokensEndTheOutputAndAreNotPartOfIt) {
  const Generation whole = Generate(GreedyRequest("Once upon a time", 16));
  ASSERT_TRUE(whole.status.ok());
  ASSERT_EQ(whole.token_ids.size(), 16u);
  const int32_t stop = whole.token_ids[6];
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 16);
  request.mutable_stopping()->add_stop_token_ids(stop);
  const Generation stopped = Generate(request);
  ASSERT_TRUE(stopped.status.ok());
  EXPECT_EQ(stopped.finished.finish_reason(), v1::FINISH_REASON_STOP_TOKEN);
  EXPECT_EQ(stopped.finished.stop_token_id(), stop);
  ASSERT_LE(stopped.token_ids.size(), 6u);
  for (size_t i = 0; i < stopped.token_ids.size(); ++i) {
    EXPECT_EQ(stopped.token_ids[i], whole.token_ids[i]);
  }
  request.mutable_stopping()->set_min_new_tokens(10);
  const Generation later = Generate(request);
  ASSERT_TRUE(later.status.ok());
  EXPECT_GE(later.token_ids.size(), 10u);
}

TEST_F(GenerateTest, NoNewTokensOnlyFeeds) {
  const Generation generation = Generate(GreedyRequest("Once", 0));
  ASSERT_TRUE(generation.status.ok());
  EXPECT_EQ(generation.events.size(), 2u);
  EXPECT_EQ(generation.finished.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(generation.finished.usage().completion_tokens(), 0);
}

TEST_F(GenerateTest, LogprobsAreThoseOfScore) {
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 12);
  request.mutable_response()->set_logprobs(true);
  const Generation generation = Generate(request);
  ASSERT_TRUE(generation.status.ok());
  v1::TokenizeRequest tokenize;
  tokenize.set_text("Once upon a time");
  const v1::TokenizeResponse prompt = Tokenize(tokenize);
  v1::ScoreRequest score;
  v1::TokenIds* const ids = score.add_inputs()->mutable_token_ids();
  *ids->mutable_ids() = prompt.token_ids();
  for (const int32_t id : generation.token_ids) ids->add_ids(id);
  score.add_inputs()->set_text("Once upon a time");
  grpc::ClientContext context;
  v1::ScoreResponse response;
  const grpc::Status status = inference_->Score(&context, score, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const v1::ScoreResult& result = response.results(0);
  ASSERT_EQ(result.logprobs_size() + 1, ids->ids_size());
  ASSERT_EQ(result.argmax_size(), ids->ids_size());
  int position = prompt.token_ids_size();
  for (const v1::GenerateResponse& event : generation.events) {
    for (const v1::TokenLogprob& logprob : event.delta().logprobs()) {
      EXPECT_EQ(logprob.logprob(), result.logprobs(position - 1));
      EXPECT_EQ(logprob.token_id(), result.argmax(position - 1));  // greedy
      ++position;
    }
  }
  EXPECT_EQ(position, ids->ids_size());
  // The second input, a prefix of the first, scores the same.
  for (int i = 0; i < response.results(1).logprobs_size(); ++i) {
    EXPECT_EQ(response.results(1).logprobs(i), result.logprobs(i));
  }
}

// The ids of each candidate.
std::vector<std::vector<int32_t>> IdsOf(const Generation& generation, size_t candidates) {
  std::vector<std::vector<int32_t>> ids(candidates);
  for (const v1::GenerateResponse& event : generation.events) {
    std::vector<int32_t>& of_candidate = ids.at(event.delta().candidate());
    of_candidate.insert(of_candidate.end(), event.delta().token_ids().begin(),
                        event.delta().token_ids().end());
  }
  return ids;
}

TEST_F(GenerateTest, CandidatesShareThePromptAndTheFirstIsTheLoneOutput) {
  const std::string text = "Once upon a time there was an old woman who lived in a small house";
  v1::GenerateRequest request = GreedyRequest(text, 40);
  request.mutable_sampling()->set_temperature(1.0f);
  request.mutable_sampling()->set_seed(5);
  request.mutable_sampling()->set_frequency_penalty(0.5f);
  request.mutable_sampling()->set_top_k(50);
  request.mutable_stopping()->add_stop_strings(".");
  request.mutable_response()->set_echo(true);
  request.mutable_response()->set_prompt_logprobs(true);
  request.mutable_response()->set_logprobs(true);
  const Generation alone = Generate(request);
  ASSERT_TRUE(alone.status.ok());
  const double before = Metric("mmfree_prompt_tokens_total{");
  request.set_candidates(4);
  const Generation several = Generate(request);
  ASSERT_TRUE(several.status.ok()) << several.status.error_message();
  const double prompt_tokens = static_cast<double>(several.started.prompt_tokens());
  EXPECT_EQ(Metric("mmfree_prompt_tokens_total{") - before, prompt_tokens + 4);

  const std::vector<std::vector<int32_t>> ids = IdsOf(several, 4);
  EXPECT_EQ(ids[0], alone.token_ids);
  EXPECT_NE(ids[1], ids[0]);
  EXPECT_NE(ids[2], ids[1]);
  std::vector<float> prompt_logprobs[2];
  std::string echo[2];
  int finished = 0;
  for (const bool of_several : {false, true}) {
    for (const v1::GenerateResponse& event : (of_several ? several : alone).events) {
      for (const auto& logprob : event.prompt().logprobs()) {
        prompt_logprobs[of_several].push_back(logprob.logprob());
      }
      echo[of_several] += event.prompt().text();
      if (!of_several || !event.has_finished()) continue;
      ++finished;
      EXPECT_EQ(event.finished().usage().prompt_tokens(), several.started.prompt_tokens());
      if (event.finished().candidate() > 0) continue;
      EXPECT_EQ(event.finished().finish_reason(), alone.finished.finish_reason());
      EXPECT_EQ(event.finished().stop_string(), alone.finished.stop_string());
      EXPECT_EQ(event.finished().cumulative_logprob(), alone.finished.cumulative_logprob());
    }
  }
  EXPECT_EQ(finished, 4);
  EXPECT_EQ(echo[true], echo[false]);
  EXPECT_EQ(prompt_logprobs[true], prompt_logprobs[false]);

  request.mutable_sampling()->set_temperature(0.0f);
  request.clear_candidates();
  const Generation greedy = Generate(request);
  request.set_candidates(3);
  for (const auto& output : IdsOf(Generate(request), 3)) EXPECT_EQ(output, greedy.token_ids);
}

TEST_F(GenerateTest, CandidatesOfAVanishedClientFreeTheirRows) {
  v1::GenerateRequest request = EndlessRequest();
  request.set_candidates(6);
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, request);
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  ASSERT_TRUE(AwaitLoad([](const auto& load) { return load.running() == 6; }));
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectIdle();
}

TEST_F(LiveServer, TheMostCandidatesFinishWithTwoSlots) {
  StartServer({"--max_sessions=2"});
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 16);
  request.mutable_sampling()->set_temperature(1.0f);
  request.mutable_sampling()->set_seed(3);
  const Generation alone = Generate(request);
  request.set_candidates(64);
  const Generation generation = Generate(request);
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  int finished = 0;
  for (const v1::GenerateResponse& event : generation.events) finished += event.has_finished();
  EXPECT_EQ(finished, 64);
  EXPECT_EQ(IdsOf(generation, 64)[0], alone.token_ids);
  ExpectIdle();
}

TEST_F(GenerateTest, BadInputGetsItsCodeAndField) {
  const auto expect = [this](const char* what, const v1::GenerateRequest& request,
                             grpc::StatusCode code, const std::string& field) {
    const Generation generation = Generate(request);
    EXPECT_EQ(generation.status.error_code(), code) << what;
    EXPECT_EQ(ViolatedField(generation.status), field) << what;
    EXPECT_FALSE(generation.status.error_message().empty()) << what;
    EXPECT_TRUE(generation.events.empty()) << what;
  };
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  const v1::GenerateRequest valid = GreedyRequest("Once", 1);
  v1::GenerateRequest request;
  expect("no input", request, kInvalid, "input");
  request = valid;
  request.mutable_token_ids();
  expect("no ids", request, kInvalid, "token_ids");
  for (const int32_t id : {-1, 4096, std::numeric_limits<int32_t>::max()}) {
    request.mutable_token_ids()->clear_ids();
    request.mutable_token_ids()->add_ids(1);
    request.mutable_token_ids()->add_ids(id);
    expect("id out of range", request, kInvalid, "token_ids.ids[1]");
  }
  request = valid;
  request.set_model("unknown");
  expect("unknown model", request, grpc::StatusCode::NOT_FOUND, "");
  request = valid;
  request.mutable_stopping()->set_max_new_tokens(std::numeric_limits<uint32_t>::max());
  expect("huge max_new_tokens", request, kInvalid, "stopping.max_new_tokens");
  for (const float temperature :
       {-1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    request = valid;
    request.mutable_sampling()->set_temperature(temperature);
    expect("temperature", request, kInvalid, "sampling.temperature");
  }
  request = valid;
  request.set_session_id("s");
  expect("session", request, grpc::StatusCode::NOT_FOUND, "");
  // Still serving.
  EXPECT_TRUE(Generate(valid).status.ok());
}

TEST_F(GenerateTest, PassedDeadlineEndsAtOnceAndFreesTheRow) {
  const Generation before = Generate(EndlessRequest(), -absl::Seconds(1));
  EXPECT_EQ(before.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  // Long enough that the stream begins, however busy the machine is.
  Generation during;
  for (absl::Duration timeout = absl::Milliseconds(300); during.events.empty(); timeout *= 2) {
    ASSERT_LT(timeout, absl::Minutes(1));
    during = Generate(EndlessRequest(), timeout);
    EXPECT_EQ(during.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  }
  EXPECT_FALSE(during.events.back().has_finished());
  ExpectIdle();
  EXPECT_GE(Metric("mmfree_requests_total{model=\"tales\",outcome=\"deadline_exceeded\"}"), 1.0);
}

TEST_F(GenerateTest, CancelledStreamFreesItsRow) {
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(Load().running(), 1);
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectIdle();
  EXPECT_EQ(Metric("mmfree_requests_total{model=\"tales\",outcome=\"cancelled\"}"), 1.0);
}

TEST_F(GenerateTest, KilledClientFreesItsRow) {
  absl::StatusOr<std::unique_ptr<InteractiveProgram>> client = InteractiveProgram::Start(
      {BuiltProgram("mmfree"), "--server=" + server_->address(), "generate", "--prompt=Once",
       "--max_tokens=60000", "--ignore_eos"});
  ASSERT_THAT(client, IsOk());
  EXPECT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) { return load.running() == 1; }));
  client->reset();
  ExpectIdle();
}

TEST_F(GenerateTest, HugePromptHasAClearOutcome) {
  std::string text;
  while (text.size() < 10'000'000) absl::StrAppend(&text, "once upon a time ");
  const Generation generation = Generate(GreedyRequest(text, 1));
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ViolatedField(generation.status), "text");
  EXPECT_THAT(generation.status.error_message(), HasSubstr("--max_prompt_tokens"));
  // Larger than a message may be.
  text.append(40'000'000, 'x');
  const Generation larger = Generate(GreedyRequest(text, 1));
  EXPECT_EQ(larger.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(larger.status.error_message(), HasSubstr("larger than max"));
  // Within the limits, but not within the time.
  text.resize(2'000'000);
  const Generation late = Generate(GreedyRequest(text, 1), absl::Seconds(2));
  EXPECT_EQ(late.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectIdle();
  EXPECT_TRUE(Generate(GreedyRequest("Once", 1)).status.ok());
}

TEST_F(GenerateTest, EveryFourByteCharacterSurvivesTokenizing) {
  constexpr uint32_t kFirst = 0x10000;
  constexpr uint32_t kLast = 0x10ffff;
  constexpr uint32_t kChunk = 0x20000;
  for (uint32_t start = kFirst; start <= kLast; start += kChunk) {
    v1::TokenizeRequest request;
    std::string* const text = request.mutable_text();
    for (uint32_t c = start; c < start + kChunk && c <= kLast; ++c) {
      text->push_back(static_cast<char>(0xf0 | (c >> 18)));
      text->push_back(static_cast<char>(0x80 | ((c >> 12) & 0x3f)));
      text->push_back(static_cast<char>(0x80 | ((c >> 6) & 0x3f)));
      text->push_back(static_cast<char>(0x80 | (c & 0x3f)));
    }
    const v1::TokenizeResponse response = Tokenize(request);
    const std::vector<int32_t> ids(response.token_ids().begin(), response.token_ids().end());
    // Not EXPECT_EQ, which would print megabytes.
    EXPECT_TRUE(Detokenize(ids, false) == *text) << "characters from " << start;
  }
}

TEST_F(GenerateTest, MixedTextSurvivesTokenizing) {
  for (const std::string text :
       {"a", "Hello, world!",
        "\u00e9\u00e8 \u65e5\u672c\u8a9e \U0001F600\U0001F468\u200D\U0001F469",
        "tabs\tand\nlines\r\n", "trailing space ", "<s>not special</s>", "\u2581underline"}) {
    v1::TokenizeRequest request;
    request.set_text(text);
    request.set_continuation(true);
    const v1::TokenizeResponse response = Tokenize(request);
    const std::string back = Detokenize(
        std::vector<int32_t>(response.token_ids().begin(), response.token_ids().end()), true);
    // U+2581 stands for the space in every SentencePiece vocabulary.
    EXPECT_THAT(back, AnyOf(text, AllOf(HasSubstr("underline"), " underline")));
  }
}

TEST_F(GenerateTest, ConcurrentStreamsGiveTheTextsOfOneAtATimeAndMemoryReturns) {
  constexpr int kStreams = 64;
  const auto request = [](int i) {
    v1::GenerateRequest request =
        GreedyRequest(absl::StrCat("Story number ", i, ": once upon a time there was"), 12);
    request.mutable_sampling()->set_temperature(i % 2 == 0 ? 0.0f : 0.9f);
    request.mutable_sampling()->set_seed(i);
    return request;
  };
  std::vector<Generation> alone;
  for (int i = 0; i < kStreams; ++i) alone.push_back(Generate(request(i)));
  const auto run_together = [&] {
    std::vector<Generation> together(kStreams);
    std::vector<std::thread> threads;
    for (int i = 0; i < kStreams; ++i) {
      threads.emplace_back([&, i] { together[i] = Generate(request(i)); });
    }
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < kStreams; ++i) {
      ASSERT_TRUE(together[i].status.ok()) << together[i].status.error_message();
      EXPECT_EQ(together[i].text, alone[i].text) << i;
      EXPECT_EQ(together[i].token_ids, alone[i].token_ids) << i;
    }
    ExpectIdle();
  };
  run_together();
  const int64_t level = ResidentBytes(server_->pid());
  for (int round = 0; round < 4; ++round) run_together();
  // What 64 streams take is reused: keeping 32 KiB of each would show after four rounds.
  if (kSanitized) GTEST_SKIP() << "all but the bound on memory, under a sanitizer";
  EXPECT_LE(ResidentBytes(server_->pid()), level + (8 << 20));
}

TEST_F(LiveServer, FullQueueIsRefusedWithAnEstimate) {
  StartServer({"--max_sessions=1", "--max_queue=0", kKeepsSlots});
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) { return load.running() == 1; }));
  const Generation refused = Generate(GreedyRequest("Once", 1));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(HasRetryDelay(refused.status)) << refused.status.error_message();
  context.TryCancel();
  reader->Finish();
  ExpectIdle();
}

}  // namespace
}  // namespace mmfree
