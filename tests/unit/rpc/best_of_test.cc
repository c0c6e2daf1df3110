#include "server/rpc/best_of.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc/candidate_group.h"
#include "tests/support/status_is.h"
#include "tests/unit/rpc/fake_engine.h"
#include "tests/unit/rpc/fake_writer.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A group of `made` candidates behind it; the engine and the transport are the test's.
struct Call {
  Call(uint32_t made, uint32_t sent, GenerationStream::Options options = {}) {
    options.cumulative_logprob = true;
    GenerationRequest request;
    request.prompt = {1, 3 + 'H', 3 + 'i'};
    best = std::make_shared<BestOf>(made, sent, &writer);
    const auto group =
        std::make_shared<CandidateGroup>(made, options, &engine, request, best.get());
    best->SetSource(group);
    group->Start();
  }
  // The prompt was fed: the candidates run.
  void EndPrompt() {
    engine.End(engine.WaitFor(0).handle, GenerationResult());
    writer.CompleteAll(best.get());
  }
  std::shared_ptr<GenerationSink> Sink(int number) { return engine.WaitFor(number + 1).sink; }
  // A candidate that emits a token for each of `bytes`, with these logprobs, and ends.
  void Run(int number, const std::string& bytes, float logprob) {
    for (const char byte : bytes) {
      Sink(number)->OnTokens({{3 + static_cast<unsigned char>(byte), logprob}});
    }
    GenerationResult result;
    result.usage = {1, 0, static_cast<int64_t>(bytes.size())};
    engine.End(engine.WaitFor(number + 1).handle, result);
  }

  FakeEngine engine;
  FakeWriter writer;
  std::shared_ptr<BestOf> best;
};

// "1:text" for a delta of candidate 1, "1." for its end.
std::vector<std::string> Events(const Call& call) {
  std::vector<std::string> all;
  for (const v1::GenerateResponse& event : call.writer.events()) {
    if (event.has_started()) all.emplace_back("started");
    if (event.has_prompt()) all.emplace_back("prompt");
    if (event.has_delta()) {
      all.push_back(absl::StrCat(event.delta().candidate(), ":", event.delta().text()));
    }
    if (event.has_finished()) all.push_back(absl::StrCat(event.finished().candidate(), "."));
  }
  return all;
}

TEST(BestOfTest, SendsTheBestWhenAllAreFinishedNumberedByTheirRank) {
  Call call(4, 2);
  call.EndPrompt();
  call.Run(3, "worst", -9.0f);
  call.Run(1, "best", -1.0f);
  call.Run(0, "bad", -5.0f);
  EXPECT_THAT(Events(call), ElementsAre("started"));
  call.Run(2, "second", -1.0f);
  call.writer.CompleteAll(call.best.get());
  EXPECT_THAT(Events(call), ElementsAre("started", "0:best", "0.", "1:second", "1."));
  ASSERT_TRUE(call.writer.status().has_value());
  EXPECT_THAT(*call.writer.status(), IsOk());
  const std::vector<v1::GenerateResponse> events = call.writer.events();
  EXPECT_EQ(events[2].finished().cumulative_logprob(), -4.0);
  EXPECT_EQ(events[4].finished().cumulative_logprob(), -6.0);
  EXPECT_EQ(events[2].finished().usage().completion_tokens(), 4);
  EXPECT_EQ(events[2].finished().usage().discarded_tokens(), 5 + 3);
  EXPECT_EQ(events[4].finished().usage().discarded_tokens(), 0);
}

TEST(BestOfTest, TiesGoToTheLowerNumberWhateverEndsFirst) {
  Call call(4, 3);
  call.EndPrompt();
  call.Run(3, "d", -1.0f);
  call.Run(2, "c", -1.0f);
  call.Run(0, "a", -2.0f);
  call.Run(1, "b", -1.0f);
  call.writer.CompleteAll(call.best.get());
  EXPECT_THAT(Events(call), ElementsAre("started", "0:b", "0.", "1:c", "1.", "2:d", "2."));
}

TEST(BestOfTest, WhatIsSaidOfTheInputIsNotHeldBack) {
  GenerationStream::Options options;
  options.echo = true;
  Call call(2, 1, options);
  call.writer.CompleteAll(call.best.get());
  EXPECT_THAT(Events(call), ElementsAre("started", "prompt"));
}

TEST(BestOfTest, LongOutputsComeWholeInFewEvents) {
  GenerationStream::Options options;
  options.return_token_ids = true;
  options.logprobs = true;
  Call call(2, 1, options);
  call.EndPrompt();
  std::string bytes;
  for (int i = 0; i < 1000; ++i) bytes += static_cast<char>('a' + i % 26);
  call.Run(1, "x", -1e9f);
  call.Run(0, bytes, -1.0f);
  call.writer.CompleteAll(call.best.get());
  std::string text;
  std::vector<int32_t> ids;
  int logprobs = 0;
  for (const v1::GenerateResponse& event : call.writer.events()) {
    text += event.delta().text();
    ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
    logprobs += event.delta().logprobs_size();
  }
  EXPECT_EQ(text, bytes);
  ASSERT_EQ(ids.size(), bytes.size());
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(ids[i], 3 + bytes[i]);
  EXPECT_EQ(logprobs, 1000);
  EXPECT_LT(call.writer.events().size(), 30u);
}

TEST(BestOfTest, NoCandidateWaitsForTheReader) {
  Call call(2, 1);
  call.EndPrompt();
  for (int i = 0; i < 500; ++i) call.Sink(0)->OnTokens(Tokens("ab"));
  EXPECT_EQ(call.Sink(0)->backlog(), 0u);
}

TEST(BestOfTest, AnErrorOfOneCandidateEndsTheCallAndNothingOfTheOthersIsSent) {
  Call call(3, 2);
  call.EndPrompt();
  call.Run(0, "fine", -1.0f);
  call.engine.End(call.engine.WaitFor(2).handle, absl::InternalError("the device failed"));
  call.engine.WaitUntilIdle();
  ASSERT_TRUE(call.writer.status().has_value());
  EXPECT_THAT(*call.writer.status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("device")));
  EXPECT_THAT(Events(call), ElementsAre("started"));
}

TEST(BestOfTest, CancelFreesWhateverRuns) {
  for (const bool during_prompt : {true, false}) {
    Call call(3, 1);
    call.writer.CompleteAll(call.best.get());
    if (!during_prompt) {
      call.EndPrompt();
      call.Run(1, "b", -1.0f);
    }
    call.best->OnCancel(false);
    call.engine.WaitUntilIdle();
    EXPECT_EQ(call.engine.cancels(), during_prompt ? 1 : 2);
    ASSERT_TRUE(call.writer.status().has_value());
    EXPECT_THAT(*call.writer.status(), StatusIs(absl::StatusCode::kCancelled, _));
  }
}

TEST(BestOfTest, AClientThatGoesWhileTheBestAreSentEndsTheCallOnce) {
  // 0:a 0. 1:b are followed by another event; the last one ends the call itself.
  for (const int taken : {0, 1, 2}) {
    for (const bool deadline : {false, true}) {
      Call call(3, 2);
      call.EndPrompt();
      for (const int number : {0, 1, 2})
        call.Run(number, std::string(1, static_cast<char>('a' + number)), -1.0f - number);
      for (int i = 0; i < taken; ++i) call.writer.CompleteWrite(call.best.get());
      call.best->OnCancel(deadline);
      EXPECT_FALSE(call.writer.status().has_value());
      call.writer.CompleteWrite(call.best.get(), /*ok=*/false);
      ASSERT_TRUE(call.writer.status().has_value());
      EXPECT_THAT(*call.writer.status(), StatusIs(deadline ? absl::StatusCode::kDeadlineExceeded
                                                           : absl::StatusCode::kCancelled,
                                                  _));
    }
  }
}

}  // namespace
}  // namespace mmfree
