#include "server/rpc/generation_stream.h"

#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"
#include "tests/support/status_is.h"
#include "tests/unit/rpc/fake_engine.h"
#include "tests/unit/rpc/fake_writer.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string TextOf(const std::vector<v1::GenerateResponse>& events) {
  std::string text;
  for (const v1::GenerateResponse& event : events) text += event.delta().text();
  return text;
}

class GenerationStreamTest : public testing::Test {
 protected:
  void Start(GenerationStream::Options options = {}) {
    options.request_id = "r1";
    options.seed = 42;
    GenerationRequest request;
    request.prompt = {1, 3 + 'H', 3 + 'i'};
    stream_ = std::make_shared<GenerationStream>(options, &engine_, request.prompt, &writer_);
    GenerationStream::Start(stream_, request);
  }

  GenerationResult Result(FinishReason reason = FinishReason::kEos) {
    GenerationResult result;
    result.reason = reason;
    result.matched_stop_token = 2;
    result.usage = {3, 0, 5};
    result.timings = {absl::Milliseconds(1), absl::Milliseconds(2), absl::Milliseconds(1500)};
    return result;
  }

  FakeEngine engine_;
  FakeWriter writer_;
  std::shared_ptr<GenerationStream> stream_;
};

TEST_F(GenerationStreamTest, StartedComesFirstAndFinishedLast) {
  Start();
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("abc"));
  writer_.CompleteWrite(stream_.get());
  stream_->OnFinished(Result());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].started().request_id(), "r1");
  EXPECT_EQ(events[0].started().model(), "fake");
  EXPECT_EQ(events[0].started().prompt_tokens(), 3);
  EXPECT_EQ(events[0].started().seed(), 42u);
  EXPECT_EQ(events[1].delta().text(), "abc");
  EXPECT_EQ(events[1].delta().token_ids_size(), 0);
  EXPECT_EQ(events[1].delta().logprobs_size(), 0);
  const v1::GenerationFinished& finished = events[2].finished();
  EXPECT_EQ(finished.finish_reason(), v1::FINISH_REASON_EOS);
  EXPECT_EQ(finished.stop_token_id(), 2);
  EXPECT_EQ(finished.usage().completion_tokens(), 5);
  EXPECT_EQ(finished.timings().decode().seconds(), 1);
  EXPECT_EQ(finished.timings().decode().nanos(), 500'000'000);
  EXPECT_FALSE(finished.has_cumulative_logprob());
  EXPECT_FALSE(finished.has_session_turn());
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), IsOk());
}

TEST_F(GenerationStreamTest, TokensThatArriveDuringAWriteLeaveTogether) {
  Start();
  stream_->OnTokens(Tokens("a"));
  stream_->OnTokens(Tokens("bc"));
  stream_->OnTokens(Tokens("d"));
  EXPECT_EQ(writer_.events().size(), 1u);  // started is still in flight
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("ef"));
  writer_.CompleteWrite(stream_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[1].delta().text(), "abcd");
  EXPECT_EQ(events[2].delta().text(), "ef");
}

TEST_F(GenerationStreamTest, BacklogIsWhatTheTransportHasNotTaken) {
  Start();
  EXPECT_EQ(stream_->backlog(), 0u);
  stream_->OnTokens(Tokens("abcd"));
  EXPECT_EQ(stream_->backlog(), 4u);  // waiting behind started
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("ef"));
  EXPECT_EQ(stream_->backlog(), 6u);  // four in flight, two waiting
  writer_.CompleteWrite(stream_.get());
  EXPECT_EQ(stream_->backlog(), 2u);
  writer_.CompleteWrite(stream_.get());
  EXPECT_EQ(stream_->backlog(), 0u);
}

TEST_F(GenerationStreamTest, UnfinishedCharacterIsHeldAndTakenFromTheBacklog) {
  Start();
  writer_.CompleteWrite(stream_.get());
  const std::string emoji = "\xf0\x9f\x98\x80";
  for (int i = 0; i < 3; ++i) {
    stream_->OnTokens(Tokens(emoji.substr(i, 1)));
    EXPECT_EQ(writer_.events().size(), 1u);
    EXPECT_EQ(stream_->backlog(), 0u);
  }
  stream_->OnTokens(Tokens(emoji.substr(3)));
  ASSERT_EQ(writer_.events().size(), 2u);
  EXPECT_EQ(writer_.events()[1].delta().text(), emoji);
}

TEST_F(GenerationStreamTest, UnfinishedCharacterAtTheEndBecomesAReplacementBeforeFinished) {
  Start();
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("x\xf0\x9f"));
  stream_->OnFinished(Result(FinishReason::kLength));
  writer_.CompleteAll(stream_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[1].delta().text(), "x");
  EXPECT_EQ(events[2].delta().text(), "\xef\xbf\xbd");
  EXPECT_EQ(events[3].finished().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(events[3].finished().matched_case(), v1::GenerationFinished::MATCHED_NOT_SET);
}

TEST_F(GenerationStreamTest, IdsAndLogprobsAreSentEvenWithoutText) {
  GenerationStream::Options options;
  options.return_token_ids = true;
  options.logprobs = true;
  Start(options);
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("\xf0\x9f"));
  writer_.CompleteWrite(stream_.get());
  stream_->OnFinished(Result());
  writer_.CompleteAll(stream_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_GE(events.size(), 3u);
  const v1::GenerationDelta& delta = events[1].delta();
  EXPECT_EQ(delta.text(), "");
  EXPECT_THAT(delta.token_ids(), ElementsAre(3 + 0xf0, 3 + 0x9f));
  ASSERT_EQ(delta.logprobs_size(), 2);
  EXPECT_EQ(delta.logprobs(1).token_id(), 3 + 0x9f);
  EXPECT_EQ(delta.logprobs(1).logprob(), -2.0f);
  EXPECT_EQ(events.back().finished().cumulative_logprob(), -3.0);
}

TEST_F(GenerationStreamTest, ErrorComesAfterTheTokensBeforeItAndInsteadOfFinished) {
  Start();
  stream_->OnTokens(Tokens("ab"));
  stream_->OnFinished(absl::UnavailableError("draining"));
  writer_.CompleteAll(stream_.get());
  EXPECT_EQ(TextOf(writer_.events()), "ab");
  EXPECT_FALSE(writer_.events().back().has_finished());
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kUnavailable, "draining"));
  EXPECT_TRUE(writer_.status()->GetPayload("type.googleapis.com/google.rpc.RetryInfo").has_value());
}

TEST_F(GenerationStreamTest, RefusalEndsTheCallWithAnEstimateOfTheWait) {
  engine_.Refuse(absl::ResourceExhaustedError("the queue is full"));
  Start();
  EXPECT_TRUE(writer_.events().empty());
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("queue is full")));
  const auto payload = writer_.status()->GetPayload("type.googleapis.com/google.rpc.RetryInfo");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(payload.has_value() && retry.ParseFromString(std::string(*payload)));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
  stream_->OnCancel(false);  // comes too late to matter
  EXPECT_EQ(engine_.cancels(), 0);
}

TEST_F(GenerationStreamTest, CancelFreesTheRequestAndEndsTheCallOnce) {
  Start();
  stream_->OnTokens(Tokens("abc"));
  stream_->OnCancel(false);
  EXPECT_EQ(engine_.cancels(), 1);
  engine_.WaitUntilIdle();
  EXPECT_FALSE(writer_.status().has_value()) << "a write is still in flight";
  writer_.CompleteWrite(stream_.get(), false);
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kCancelled, _));
  EXPECT_EQ(stream_->backlog(), 0u);
}

TEST_F(GenerationStreamTest, PassedDeadlineIsLeftToTheEngine) {
  Start();
  writer_.CompleteWrite(stream_.get());
  stream_->OnCancel(true);
  EXPECT_EQ(engine_.cancels(), 0);
  engine_.End(1, absl::DeadlineExceededError("the deadline passed"));
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kDeadlineExceeded, _));
}

TEST_F(GenerationStreamTest, CancelAfterTheResultStillEndsTheCall) {
  Start();
  stream_->OnTokens(Tokens("abc"));
  stream_->OnFinished(Result());
  stream_->OnCancel(false);
  writer_.CompleteWrite(stream_.get(), false);
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kCancelled, _));
}

TEST_F(GenerationStreamTest, AStopStringEndsTheTextAndIsNamed) {
  GenerationStream::Options options;
  options.return_token_ids = true;
  options.text.stop_strings =
      std::make_shared<const StopStrings>(std::vector<std::string>{"xyz", "END"});
  Start(options);
  writer_.CompleteWrite(stream_.get());
  stream_->OnTokens(Tokens("ab E"));
  writer_.CompleteAll(stream_.get());
  EXPECT_EQ(TextOf(writer_.events()), "ab ") << "the beginning of a stop string was shown";
  stream_->OnTokens(Tokens("ND"));
  stream_->OnFinished(Result(FinishReason::kStopString));
  writer_.CompleteAll(stream_.get());
  EXPECT_EQ(TextOf(writer_.events()), "ab ");
  const std::vector<v1::GenerateResponse> events = writer_.events();
  int ids = 0;
  for (const v1::GenerateResponse& event : events) ids += event.delta().token_ids_size();
  EXPECT_EQ(ids, 6);
  EXPECT_EQ(events.back().finished().finish_reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(events.back().finished().stop_string(), "END");
}

TEST_F(GenerationStreamTest, TextHeldBackAtTheEndIsSentBeforeFinished) {
  GenerationStream::Options options;
  options.text.stop_strings = std::make_shared<const StopStrings>(std::vector<std::string>{"END"});
  Start(options);
  stream_->OnTokens(Tokens("ab EN"));
  stream_->OnFinished(Result(FinishReason::kLength));
  writer_.CompleteAll(stream_.get());
  EXPECT_EQ(TextOf(writer_.events()), "ab EN");
  EXPECT_EQ(writer_.events().back().finished().matched_case(),
            v1::GenerationFinished::MATCHED_NOT_SET);
}

TEST_F(GenerationStreamTest, ThePromptComesAfterStartedAndBeforeTheTokens) {
  GenerationStream::Options options;
  options.echo = true;
  options.return_token_ids = true;
  Start(options);
  stream_->OnTokens(Tokens("abc"));
  stream_->OnFinished(Result());
  writer_.CompleteAll(stream_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_TRUE(events[0].has_started());
  EXPECT_EQ(events[1].prompt().text(), "Hi");
  EXPECT_THAT(events[1].prompt().token_ids(), ElementsAre(1, 3 + 'H', 3 + 'i'));
  EXPECT_EQ(events[1].prompt().logprobs_size(), 0);
  EXPECT_EQ(events[2].delta().text(), "abc");
}

TEST_F(GenerationStreamTest, PromptLogprobsAreAwaitedAndTheFirstTokenHasNone) {
  GenerationStream::Options options;
  options.prompt_logprobs = true;
  Start(options);
  writer_.CompleteAll(stream_.get());
  EXPECT_EQ(writer_.events().size(), 1u);
  stream_->OnPromptLogprobs({-1.5f, -2.5f}, {});
  stream_->OnTokens(Tokens("a"));
  writer_.CompleteAll(stream_.get());
  const std::vector<v1::GenerateResponse> events = writer_.events();
  ASSERT_EQ(events.size(), 3u);
  ASSERT_EQ(events[1].prompt().logprobs_size(), 3);
  EXPECT_EQ(events[1].prompt().text(), "");
  EXPECT_EQ(events[1].prompt().logprobs(0).token_id(), 1);
  EXPECT_EQ(events[1].prompt().logprobs(0).logprob(), 0.0f);
  EXPECT_EQ(events[1].prompt().logprobs(2).token_id(), 3 + 'i');
  EXPECT_EQ(events[1].prompt().logprobs(2).logprob(), -2.5f);
  stream_->OnFinished(absl::UnavailableError("draining"));
  EXPECT_TRUE(writer_.status().has_value());
}

TEST_F(GenerationStreamTest, AnEndBeforeThePromptsLogprobsEndsTheCall) {
  GenerationStream::Options options;
  options.prompt_logprobs = true;
  Start(options);
  writer_.CompleteAll(stream_.get());
  stream_->OnFinished(absl::UnavailableError("draining"));
  EXPECT_EQ(writer_.events().size(), 1u);
  ASSERT_TRUE(writer_.status().has_value());
  EXPECT_THAT(*writer_.status(), StatusIs(absl::StatusCode::kUnavailable, _));
}

TEST_F(GenerationStreamTest, ALongPromptComesInParts) {
  GenerationStream::Options options;
  options.request_id = "r";
  options.echo = true;
  GenerationRequest request;
  std::string text;
  while (text.size() < 5000) text += "na\u00efve ";
  request.prompt = {1};
  for (const char c : text) request.prompt.push_back(3 + static_cast<unsigned char>(c));
  stream_ = std::make_shared<GenerationStream>(options, &engine_, request.prompt, &writer_);
  GenerationStream::Start(stream_, request);
  stream_->OnFinished(Result());
  writer_.CompleteAll(stream_.get());
  std::string echoed;
  int parts = 0;
  for (const v1::GenerateResponse& event : writer_.events()) {
    echoed += event.prompt().text();
    parts += event.has_prompt() ? 1 : 0;
  }
  EXPECT_EQ(echoed, text);
  EXPECT_GT(parts, 2);
}

// The three sources of calls at once: the engine delivers, the transport completes, the client
// goes. Meant for ThreadSanitizer; the contract is checked by FakeWriter.
TEST_F(GenerationStreamTest, EndsOnceWhateverTheInterleaving) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    FakeEngine engine;
    FakeWriter writer;
    GenerationRequest request;
    request.prompt = {1};
    auto stream = std::make_shared<GenerationStream>(GenerationStream::Options(), &engine,
                                                     request.prompt, &writer);
    const bool cancels = random() % 2 == 0;
    const int tokens = static_cast<int>(random() % 20);
    std::thread deliverer([&engine, tokens] {
      const FakeEngine::Submission submission = engine.WaitFor(0);
      for (int i = 0; i < tokens; ++i) submission.sink->OnTokens(Tokens("x"));
      engine.End(submission.handle, GenerationResult());
    });
    std::thread transport([&] {
      while (!writer.status().has_value()) {
        writer.AwaitWriteOrEnd();
        writer.CompleteWrite(stream.get());
      }
    });
    std::thread client([&] {
      if (cancels) stream->OnCancel(false);
    });
    GenerationStream::Start(stream, request);
    deliverer.join();
    client.join();
    transport.join();
    ASSERT_TRUE(writer.status().has_value());
    EXPECT_EQ(stream->backlog(), 0u);
    if (!cancels) {
      EXPECT_THAT(*writer.status(), IsOk());
      EXPECT_EQ(TextOf(writer.events()), std::string(tokens, 'x'));
    }
  }
}

}  // namespace
}  // namespace mmfree
