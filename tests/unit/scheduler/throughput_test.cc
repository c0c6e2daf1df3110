#include "server/scheduler/throughput.h"

#include <gtest/gtest.h>

namespace mmfree {
namespace {

// A device whose steps take 2 ms, and 10 us a prompt token on top.
void Feed(Throughput* throughput, int64_t prompt_tokens, int steps) {
  for (int i = 0; i < steps; ++i) {
    throughput->Observe(absl::Milliseconds(2) + absl::Microseconds(10) * prompt_tokens, 0,
                        prompt_tokens);
  }
}

TEST(ThroughputTest, TinyPromptsDoNotMakeALongOneLookSlow) {
  Throughput throughput(/*full_chunk=*/256);
  constexpr int64_t kPrompt = 25'600;
  const absl::Duration takes = 100 * (absl::Milliseconds(2) + absl::Microseconds(2560));
  Feed(&throughput, 1, 100);
  EXPECT_LE(throughput.ServiceTime(kPrompt, 0), takes);
  Feed(&throughput, 256, 100);
  Feed(&throughput, 1, 100);
  EXPECT_LE(throughput.ServiceTime(kPrompt, 0), takes);
  // It is measured all the same.
  EXPECT_GE(throughput.ServiceTime(kPrompt, 0), takes * 0.9);
}

// The first streams of a server wait no longer for the prompts beside them than any later ones.
TEST(ThroughputTest, TheFirstStepThatFedAPromptBoundsThePromptsOfTheNext) {
  Throughput throughput(/*full_chunk=*/256);
  throughput.Observe(absl::Milliseconds(700), 0, 700);
  EXPECT_EQ(throughput.PromptBudget(absl::Milliseconds(50), 1), 50);
  // A cold first step is forgotten with the next.
  throughput.Observe(absl::Milliseconds(7), 0, 700);
  EXPECT_EQ(throughput.PromptBudget(absl::Milliseconds(50), 1), 5000);
}

// Whoever comes during such a step waits for its end.
TEST(ThroughputTest, WithoutStreamsAStepKeepsToTheTargetOrToOneChunk) {
  Throughput throughput(/*full_chunk=*/256);
  const absl::Duration target = absl::Milliseconds(50);
  EXPECT_EQ(throughput.PromptBudget(target, 0), 256) << "nothing is known yet";
  throughput.Observe(absl::Milliseconds(25), 0, 250);
  EXPECT_EQ(throughput.PromptBudget(target, 0), 500);
  throughput.Observe(absl::Seconds(1000), 0, 100);
  EXPECT_EQ(throughput.PromptBudget(target, 0), 256);
  EXPECT_EQ(throughput.PromptBudget(target, 1), 16);
}

// Under a flood of prompts there is no step without them to measure.
TEST(ThroughputTest, ManyRowsOfThePastDoNotMakeStepsOfFewLong) {
  Throughput throughput(/*full_chunk=*/256);
  for (int i = 0; i < 100; ++i) throughput.Observe(absl::Milliseconds(100), 0, 1000);
  for (int i = 0; i < 100; ++i) throughput.Observe(absl::Milliseconds(256), 256, 0);
  const absl::Duration target = absl::Milliseconds(50);
  EXPECT_NEAR(static_cast<double>(throughput.PromptBudget(target, 256)), 2560, 10);
  EXPECT_NEAR(static_cast<double>(throughput.PromptBudget(target, 8)), 420, 10);
}

}  // namespace
}  // namespace mmfree
