// What a request brings along to decide its tokens and its end: samplers, stop conditions, scores
// of the prompt.
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "server/sampling/sampler.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/status_is.h"
#include "tests/unit/scheduler/step_loop_fixture.h"

namespace mmfree {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class StepLoopSamplingTest : public StepLoopFixture {
 protected:
  std::shared_ptr<RequestSampler> Sampler(const RequestSampler::Options& options) const {
    return std::make_shared<RequestSampler>(options, device_options_.vocab_size,
                                            absl::Span<const int32_t>());
  }
};

TEST_F(StepLoopSamplingTest, ASamplerIsToldOfEveryToken) {
  Start();
  GenerationRequest request = Generation(Prompt(5), 90);
  RequestSampler::Options options;
  options.penalties.presence = 100.0f;  // more than any two logits differ by
  request.sampler = Sampler(options);
  auto sink = std::make_shared<CollectingSink>();
  MustSubmit(std::move(request), sink);
  ASSERT_TRUE(sink->WaitForEnd().ok());
  const std::vector<int32_t> ids = sink->ids();
  EXPECT_THAT(std::set<int32_t>(ids.begin(), ids.end()), SizeIs(90)) << "a token came twice";
}

TEST_F(StepLoopSamplingTest, NothingLeftToChooseFromEndsThatRequestAlone) {
  Start();
  RequestSampler::Options options;
  options.allowed = {7};
  options.banned = {7};
  GenerationRequest request = Generation(Prompt(5), 10);
  request.sampler = Sampler(options);
  auto sink = std::make_shared<CollectingSink>();
  auto other = std::make_shared<CollectingSink>();
  MustSubmit(std::move(request), sink);
  MustSubmit(Generation(Prompt(4), 10), other);
  EXPECT_THAT(sink->WaitForEnd(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no token is left")));
  EXPECT_THAT(sink->ids(), IsEmpty());
  ASSERT_TRUE(other->WaitForEnd().ok());
  EXPECT_THAT(other->ids(), ElementsAreArray(ExpectedIds(Prompt(4), 10)));
}

// Ends after so many tokens.
class CountingStop final : public StopCondition {
 public:
  explicit CountingStop(int tokens) : left_(tokens) {}
  bool Append(int32_t) override { return --left_ == 0; }
  std::unique_ptr<StopCondition> Clone() const override {
    return std::make_unique<CountingStop>(*this);
  }

 private:
  int left_;
};

TEST_F(StepLoopSamplingTest, AStopConditionEndsTheGenerationWithItsToken) {
  Start();
  for (const int tokens : {1, 4, 10}) {  // 10: before the length
    GenerationRequest request = Generation(Prompt(5), 10);
    request.stop_condition = std::make_shared<CountingStop>(tokens);
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(std::move(request), sink);
    const absl::StatusOr<GenerationResult> result = sink->WaitForEnd();
    ASSERT_TRUE(result.ok());
    EXPECT_EQ(result->reason, FinishReason::kStopString);
    EXPECT_EQ(result->usage.completion_tokens, tokens);
    EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(Prompt(5), tokens)));
  }
  EXPECT_EQ(Outcomes("stop_string"), 3);
}

// Stops at nothing but the end.
class StopAtTheEnd final : public StopCondition {
 public:
  bool Append(int32_t) override { return false; }
  bool Finish() override { return true; }
  std::unique_ptr<StopCondition> Clone() const override { return std::make_unique<StopAtTheEnd>(); }
};

TEST_F(StepLoopSamplingTest, AStopConditionMayBeMetByTheEnd) {
  Start();
  const int32_t fourth = ExpectedIds(Prompt(5), 4).back();
  for (const bool length : {false, true}) {
    GenerationRequest request = Generation(Prompt(5), length ? 3 : 10);
    request.stop_token_ids = {fourth};
    request.stop_condition = std::make_shared<StopAtTheEnd>();
    auto sink = std::make_shared<CollectingSink>();
    MustSubmit(std::move(request), sink);
    const absl::StatusOr<GenerationResult> result = sink->WaitForEnd();
    ASSERT_TRUE(result.ok());
    EXPECT_EQ(result->reason, FinishReason::kStopString);
    EXPECT_EQ(result->matched_stop_token, -1);
    EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(Prompt(5), 3)));
  }
}

class PromptSink final : public GenerationSink {
 public:
  explicit PromptSink(std::shared_ptr<CollectingSink> sink) : sink_(std::move(sink)) {}
  void OnPromptLogprobs(absl::Span<const float> logprobs,
                        absl::Span<const TokenAlternatives> top) override {
    EXPECT_THAT(sink_->ids(), IsEmpty()) << "tokens before the prompt";
    EXPECT_THAT(logprobs_, IsEmpty()) << "twice";
    logprobs_.assign(logprobs.begin(), logprobs.end());
    top_.assign(top.begin(), top.end());
  }
  void OnTokens(absl::Span<const SampledToken> tokens) override { sink_->OnTokens(tokens); }
  void OnFinished(const absl::StatusOr<GenerationResult>& result) override {
    sink_->OnFinished(result);
  }
  size_t backlog() const override { return 0; }
  // After the end.
  const std::vector<float>& logprobs() const { return logprobs_; }
  const std::vector<TokenAlternatives>& top() const { return top_; }

 private:
  const std::shared_ptr<CollectingSink> sink_;
  std::vector<float> logprobs_;
  std::vector<TokenAlternatives> top_;
};

TEST_F(StepLoopSamplingTest, ThePromptsLogprobsAreThoseOfScoringWhateverTheChunk) {
  options_.policy.prefill_chunk = 4;
  Start();
  const std::vector<int32_t> prompt = Prompt(11);
  std::vector<float> expected;
  for (size_t i = 1; i < prompt.size(); ++i) {
    expected.push_back(
        device_->ExpectedScore(absl::MakeConstSpan(prompt).first(i), prompt[i]).logprob);
  }
  for (const int max_new_tokens : {0, 6}) {
    GenerationRequest request = Generation(prompt, max_new_tokens);
    request.prompt_logprobs = true;
    auto sink = std::make_shared<CollectingSink>();
    auto prompt_sink = std::make_shared<PromptSink>(sink);
    MustSubmit(std::move(request), prompt_sink);
    ASSERT_TRUE(sink->WaitForEnd().ok());
    EXPECT_EQ(prompt_sink->logprobs(), expected);
    EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(prompt, max_new_tokens)));
  }
}

TEST_F(StepLoopSamplingTest, AlternativesInThePromptAreThoseOfEachPlaceWhateverTheChunk) {
  options_.policy.prefill_chunk = 4;
  Start();
  for (const int length : {1, 2, 4, 5, 11}) {
    const std::vector<int32_t> prompt = Prompt(length);
    for (const int max_new_tokens : {0, 3}) {
      GenerationRequest request = Generation(prompt, max_new_tokens);
      request.prompt_logprobs = true;
      request.prompt_top_logprobs = 3;
      request.final_state = std::make_shared<FinalState>();
      auto sink = std::make_shared<CollectingSink>();
      auto prompt_sink = std::make_shared<PromptSink>(sink);
      MustSubmit(std::move(request), prompt_sink);
      ASSERT_TRUE(sink->WaitForEnd().ok());
      EXPECT_THAT(sink->ids(), ElementsAreArray(ExpectedIds(prompt, max_new_tokens)));
      ASSERT_THAT(prompt_sink->top(), SizeIs(length - 1));
      for (int i = 1; i < length; ++i) {
        const std::vector<float> logits =
            device_->ExpectedLogits(absl::MakeConstSpan(prompt).first(static_cast<size_t>(i)));
        ASSERT_NE(prompt_sink->top()[i - 1], nullptr);
        const std::vector<TokenAlternative>& top = *prompt_sink->top()[i - 1];
        ASSERT_THAT(top, SizeIs(3));
        EXPECT_EQ(top[0].token, ArgMax(logits));
        EXPECT_EQ(top[0].logprob, ScoreToken(logits, top[0].token).logprob);
        EXPECT_GE(logits[top[1].token], logits[top[2].token]);
      }
    }
  }
}

}  // namespace
}  // namespace mmfree
