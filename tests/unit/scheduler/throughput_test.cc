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

}  // namespace
}  // namespace mmfree
