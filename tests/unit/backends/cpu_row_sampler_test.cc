// Sampling and scoring with the vector kernels give what server/sampling defines.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/row_sampler.h"
#include "server/sampling/sampler.h"
#include "tests/unit/backends/cpu_test_support.h"

namespace mmfree {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class RowSamplerTest : public VectorKernelsTest {
 protected:
  void ExpectSame(const std::vector<float>& logits, const SamplingParams& params,
                  uint64_t position) {
    const SampledToken expected = Sample(logits, params, position);
    for (const cpu::Kernels* kernels : {scalar_, vector_}) {
      std::vector<float> scratch = logits;
      const SampledToken actual =
          cpu::SampleRow(*kernels, absl::MakeSpan(scratch), params, position);
      EXPECT_EQ(actual.token, expected.token) << kernels->name;
      if (!std::isnan(expected.logprob)) {
        EXPECT_TRUE(SameBits(expected.logprob, actual.logprob)) << kernels->name;
      }
      const TokenScore score = ScoreToken(logits, expected.token);
      const TokenScore row = cpu::ScoreRow(*kernels, logits, expected.token);
      EXPECT_EQ(row.argmax, score.argmax);
      if (!std::isnan(score.logprob)) {
        EXPECT_TRUE(SameBits(score.logprob, row.logprob)) << kernels->name;
      }
      EXPECT_EQ(cpu::ScoreRow(*kernels, logits, -1).logprob, 0.0f);
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, RowSamplerTest, testing::ValuesIn(kVectorIsas), IsaTestName);

TEST_P(RowSamplerTest, DrawsTheSameTokensAtEveryTemperatureAndLength) {
  TestRandom random(21);
  for (int64_t vocab : {1, 2, 7, 8, 9, 17, 63, 511, 512, 513, 4096, 32001}) {
    for (float temperature : {0.0f, 0.3f, 1.0f, 5.0f, 1e30f}) {
      for (int draw = 0; draw < 4; ++draw) {
        SamplingParams params;
        params.temperature = temperature;
        params.seed = random.Next();
        ExpectSame(random.Floats(vocab, -20.0f, 20.0f), params, random.Next());
      }
    }
  }
}

TEST_P(RowSamplerTest, BannedTokensAreNotDrawn) {
  TestRandom random(22);
  for (int64_t vocab : {2, 9, 300}) {
    for (int draw = 0; draw < 40; ++draw) {
      std::vector<int32_t> banned;
      for (int i = 0; i <= draw % 20; ++i) {
        banned.push_back(static_cast<int32_t>(random.Below(vocab - 1)));
      }
      SamplingParams params;
      params.temperature = draw % 3 == 0 ? 0.0f : 0.7f;
      params.seed = random.Next();
      params.banned = banned;
      const std::vector<float> logits = random.Floats(vocab, -2.0f, 2.0f);
      ExpectSame(logits, params, 5);
      std::vector<float> scratch = logits;
      const SampledToken token = cpu::SampleRow(*vector_, absl::MakeSpan(scratch), params, 5);
      EXPECT_FALSE(IsBanned(banned.data(), static_cast<int>(banned.size()), token.token));
    }
  }
}

TEST_P(RowSamplerTest, TiesAndUnusualLogitsGoToTheSameToken) {
  const std::vector<int32_t> first = {0};
  std::vector<std::vector<float>> rows = {
      std::vector<float>(40, 1.5f),
      std::vector<float>(40, kNan),
      std::vector<float>(40, -kInfinity),
      std::vector<float>(40, kInfinity),
      {0.0f, -0.0f, 0.0f, -0.0f, -1.0f, -0.0f, 0.0f, 0.0f, 0.0f},
      {-0.0f, 0.0f, -1.0f},
      {kNan, -kInfinity, kNan, -kInfinity},
      {kNan, kNan, 3.0f, kNan, 3.0f},
      {1.0f, kInfinity, kNan, kInfinity},
      {-3e38f, 3e38f, 1.0f},
  };
  for (const std::vector<float>& logits : rows) {
    for (float temperature : {0.0f, 1.0f, 0.5f}) {
      SamplingParams params;
      params.temperature = temperature;
      params.seed = 9;
      ExpectSame(logits, params, 3);
      params.banned = first;
      ExpectSame(logits, params, 3);
    }
  }
}

}  // namespace
}  // namespace mmfree
