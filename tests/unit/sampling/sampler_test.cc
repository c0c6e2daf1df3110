// The scalar sampler against a float64 one, its distribution, and the corners of its definition.
#include "server/sampling/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace mmfree {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(size_t count, uint64_t seed, float spread) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// Probabilities at a temperature in float64; banned ids have none.
std::vector<double> Probabilities(const std::vector<float>& logits, double temperature,
                                  const std::vector<int32_t>& banned = {}) {
  std::vector<double> p(logits.size());
  double max = -std::numeric_limits<double>::infinity();
  const auto allowed = [&](size_t i) {
    return !std::isnan(logits[i]) &&
           std::count(banned.begin(), banned.end(), static_cast<int32_t>(i)) == 0;
  };
  for (size_t i = 0; i < p.size(); ++i) {
    if (allowed(i)) max = std::max<double>(max, logits[i]);
  }
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    p[i] = allowed(i) ? std::exp((logits[i] - max) / temperature) : 0;
    total += p[i];
  }
  for (double& value : p) value /= total;
  return p;
}

SamplingParams At(float temperature, uint64_t seed = 1) {
  SamplingParams params;
  params.temperature = temperature;
  params.seed = seed;
  return params;
}

TEST(SamplerTest, DrawsWhatAFloat64SamplerDraws) {
  int near_edges = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<float> logits = RandomLogits(1000, seed, 3.0f);
    for (const float temperature : {0.3f, 1.0f, 2.5f}) {
      const std::vector<double> p = Probabilities(logits, temperature);
      for (uint64_t position = 0; position < 50; ++position) {
        const double u = std::ldexp(static_cast<double>(UniformBits(seed, position, 0, 0)), -64);
        double sum = 0;
        double distance = 1;
        int32_t expected = -1;
        for (size_t i = 0; i < p.size(); ++i) {
          sum += p[i];
          distance = std::min(distance, std::fabs(sum - u));
          if (expected < 0 && sum > u) expected = static_cast<int32_t>(i);
        }
        // Where u is within rounding of an edge either neighbour is right.
        if (distance < 1e-6) {
          ++near_edges;
          continue;
        }
        ASSERT_EQ(Sample(logits, At(temperature, seed), position).token, expected);
      }
    }
  }
  EXPECT_LT(near_edges, 30);
}

TEST(SamplerTest, LogprobIsTheModelsAtTemperatureOne) {
  const std::vector<float> logits = RandomLogits(500, 7, 4.0f);
  const std::vector<double> p = Probabilities(logits, 1.0);
  for (const float temperature : {0.0f, 0.5f, 1.0f, 3.0f}) {
    for (uint64_t position = 0; position < 20; ++position) {
      const SampledToken sampled = Sample(logits, At(temperature), position);
      EXPECT_NEAR(sampled.logprob, std::log(p[sampled.token]), 2e-6 * 20);
      EXPECT_EQ(sampled.logprob, ScoreToken(logits, sampled.token).logprob);
    }
  }
}

// Chi-square of observed counts; bins below 5 expected draws are merged.
double ChiSquare(const std::vector<int>& counts, const std::vector<double>& p, int draws,
                 int* degrees) {
  double chi = 0, rest_p = 0;
  int rest = 0;
  *degrees = -1;
  for (size_t i = 0; i < p.size(); ++i) {
    const double expected = p[i] * draws;
    if (expected < 5) {
      rest_p += p[i];
      rest += counts[i];
      continue;
    }
    chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++*degrees;
  }
  if (rest_p * draws > 0) {
    chi += (rest - rest_p * draws) * (rest - rest_p * draws) / (rest_p * draws);
    ++*degrees;
  }
  return chi;
}

TEST(SamplerTest, DrawsFollowTheDistribution) {
  const std::vector<float> logits = RandomLogits(40, 3, 1.5f);
  const std::vector<int32_t> banned = {3, 17, 30};
  constexpr int kDraws = 40000;
  for (const bool ban : {false, true}) {
    for (const float temperature : {0.7f, 1.0f, 2.0f}) {
      SamplingParams params = At(temperature, 1234);
      if (ban) params.banned = banned;
      std::vector<int> counts(logits.size());
      for (uint64_t position = 0; position < kDraws; ++position) {
        ++counts[Sample(logits, params, position).token];
      }
      int degrees = 0;
      const double chi = ChiSquare(
          counts, Probabilities(logits, temperature, ban ? banned : std::vector<int32_t>{}), kDraws,
          &degrees);
      // Six standard deviations: the seeds are fixed, so this either holds or the sampler is wrong.
      EXPECT_LT(chi, degrees + 6 * std::sqrt(2.0 * degrees)) << temperature << " " << ban;
      EXPECT_GT(degrees, 10);
    }
  }
}

TEST(SamplerTest, DrawsOfPositionsSeedsAndCandidatesAreIndependent) {
  const std::vector<float> logits(16, 0.0f);
  // Pairs of draws that differ in one argument fall on the 256 cells evenly.
  for (int varied = 0; varied < 3; ++varied) {
    std::vector<int> counts(256);
    constexpr int kDraws = 25600;
    for (int i = 0; i < kDraws; ++i) {
      SamplingParams first = At(1.0f, static_cast<uint64_t>(varied == 0 ? 2 * i : 5));
      SamplingParams second = At(1.0f, static_cast<uint64_t>(varied == 0 ? 2 * i + 1 : 5));
      first.candidate = static_cast<uint32_t>(varied == 1 ? 2 * i : 0);
      second.candidate = static_cast<uint32_t>(varied == 1 ? 2 * i + 1 : 0);
      const auto position = static_cast<uint64_t>(varied == 2 ? 2 * i : 9);
      const int a = Sample(logits, first, position).token;
      const int b = Sample(logits, second, position + (varied == 2 ? 1 : 0)).token;
      ++counts[a * 16 + b];
    }
    int degrees = 0;
    const double chi = ChiSquare(counts, std::vector<double>(256, 1.0 / 256), kDraws, &degrees);
    EXPECT_LT(chi, degrees + 6 * std::sqrt(2.0 * degrees)) << varied;
  }
}

TEST(SamplerTest, WeightsSumTheSameInEveryOrder) {
  std::vector<float> logits = RandomLogits(32000, 5, 5.0f);
  const float max = *std::max_element(logits.begin(), logits.end());
  const auto total = [&](const std::vector<float>& order) {
    uint64_t sum = 0;
    for (const float logit : order) sum += LogitWeight(logit, max, 1.0f);
    return sum;
  };
  const uint64_t in_order = total(logits);
  std::vector<float> shuffled = logits;
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937_64(1));
  EXPECT_EQ(total(shuffled), in_order);
  std::sort(shuffled.begin(), shuffled.end());
  EXPECT_EQ(total(shuffled), in_order);
}

TEST(SamplerTest, WeightsAreExactAtTheMaximumAndVanishFarBelow) {
  EXPECT_EQ(LogitWeight(3.0f, 3.0f, 1.0f), uint64_t{1} << 40);
  EXPECT_EQ(LogitWeight(3.0f, 3.0f, 100.0f), uint64_t{1} << 40);
  EXPECT_EQ(LogitWeight(-100.0f, 0.0f, 1.0f), 0u);
  EXPECT_EQ(LogitWeight(-87.0f, 0.0f, 1.0f), 0u);
  EXPECT_EQ(LogitWeight(-kInf, 0.0f, 1.0f), 0u);
  EXPECT_EQ(LogitWeight(kNaN, 0.0f, 1.0f), 0u);
  EXPECT_NEAR(static_cast<double>(LogitWeight(-1.0f, 0.0f, 1.0f)), std::exp(-1.0) * kWeightOne,
              1e-7 * kWeightOne);
}

TEST(SamplerTest, TiesOfTheMaximumGoToTheLowestId) {
  EXPECT_EQ(ArgMax(std::vector<float>{1, 5, 5, 2}), 1);
  EXPECT_EQ(ArgMax(std::vector<float>{-0.0f, 0.0f}), 0);
  EXPECT_EQ(ArgMax(std::vector<float>{1, 5, 5, 2}, std::vector<int32_t>{1}), 2);
  EXPECT_EQ(ArgMax(std::vector<float>{1, 5, 5, 2}, std::vector<int32_t>{2, 1, 1}), 3);
  EXPECT_EQ(Sample(std::vector<float>{1, 5, 5, 2}, At(0), 0).token, 1);
}

TEST(SamplerTest, NaNCountsAsMinusInfinity) {
  const std::vector<float> logits = {kNaN, 1.0f, kNaN, 2.0f};
  EXPECT_EQ(ArgMax(logits), 3);
  EXPECT_EQ(ArgMax(logits, std::vector<int32_t>{3}), 1);
  EXPECT_EQ(ArgMax(logits, std::vector<int32_t>{1, 3}), 0);
  EXPECT_EQ(ArgMax(std::vector<float>{kNaN, -kInf}), 1);
  EXPECT_EQ(ArgMax(std::vector<float>{kNaN, kNaN}), 0);
  for (uint64_t position = 0; position < 200; ++position) {
    const SampledToken sampled = Sample(logits, At(1.0f), position);
    EXPECT_TRUE(sampled.token == 1 || sampled.token == 3);
    EXPECT_TRUE(std::isfinite(sampled.logprob));
  }
  // Whatever the logits, the token is one of the vocabulary.
  for (const std::vector<float>& bad :
       {std::vector<float>{kNaN, kNaN, kNaN}, std::vector<float>{kInf, 0.0f, kInf},
        std::vector<float>{-kInf, -kInf, -kInf}, std::vector<float>{kInf, kNaN, -kInf}}) {
    for (const float temperature : {0.0f, 1.0f}) {
      EXPECT_EQ(Sample(bad, At(temperature), 3).token, 0);
      EXPECT_EQ(ScoreToken(bad, 2).argmax, 0);
    }
  }
}

TEST(SamplerTest, TinyTemperaturesAreGreedy) {
  const std::vector<float> logits = RandomLogits(300, 11, 2.0f);
  const int32_t best = ArgMax(logits);
  for (const float temperature : {1e-4f, 1e-30f, std::numeric_limits<float>::min(),
                                  std::numeric_limits<float>::denorm_min()}) {
    for (uint64_t position = 0; position < 50; ++position) {
      EXPECT_EQ(Sample(logits, At(temperature), position).token, best) << temperature;
    }
  }
}

TEST(SamplerTest, HugeTemperaturesAreUniform) {
  const std::vector<float> logits = {0, 10, -10, 3};
  std::vector<int> counts(4);
  for (uint64_t position = 0; position < 4000; ++position) {
    ++counts[Sample(logits, At(std::numeric_limits<float>::max()), position).token];
  }
  for (const int count : counts) EXPECT_NEAR(count, 1000, 6 * std::sqrt(750));
}

TEST(SamplerTest, BannedIdsAreNeverDrawnHoweverLikely) {
  std::vector<float> logits = RandomLogits(100, 13, 1.0f);
  logits[40] = 60.0f;  // all of the probability
  logits[41] = 59.0f;
  const std::vector<int32_t> banned = {40, 41};
  std::vector<float> masked = logits;
  masked[40] = masked[41] = kNaN;
  for (const float temperature : {0.0f, 0.5f, 1.0f, 2.0f}) {
    SamplingParams params = At(temperature);
    params.banned = banned;
    for (uint64_t position = 0; position < 200; ++position) {
      const SampledToken sampled = Sample(logits, params, position);
      // The draw is that of a model which never says them; the logprob is the model's own.
      EXPECT_EQ(sampled.token, Sample(masked, At(temperature), position).token);
      EXPECT_EQ(sampled.logprob, ScoreToken(logits, sampled.token).logprob);
    }
  }
}

TEST(SamplerTest, BanningWhatIsNeverDrawnChangesNothing) {
  std::vector<float> logits = RandomLogits(100, 17, 1.0f);
  logits[7] = -200.0f;
  const std::vector<int32_t> banned = {7};
  for (uint64_t position = 0; position < 200; ++position) {
    SamplingParams params = At(1.0f);
    const SampledToken without = Sample(logits, params, position);
    params.banned = banned;
    const SampledToken with = Sample(logits, params, position);
    EXPECT_EQ(with.token, without.token);
    EXPECT_EQ(with.logprob, without.logprob);
  }
}

TEST(SamplerTest, ScoresAreOfTheTarget) {
  const std::vector<float> logits = RandomLogits(200, 19, 2.0f);
  const std::vector<double> p = Probabilities(logits, 1.0);
  double total = 0;
  for (int32_t id = 0; id < 200; ++id) {
    const TokenScore score = ScoreToken(logits, id);
    EXPECT_NEAR(score.logprob, std::log(p[id]), 1e-5);
    EXPECT_EQ(score.argmax, ArgMax(logits));
    total += std::exp(static_cast<double>(score.logprob));
  }
  EXPECT_NEAR(total, 1.0, 1e-5);
  EXPECT_EQ(ScoreToken(logits, -1).logprob, 0.0f);
  EXPECT_EQ(ScoreToken(logits, -1).argmax, ArgMax(logits));
}

}  // namespace
}  // namespace mmfree
