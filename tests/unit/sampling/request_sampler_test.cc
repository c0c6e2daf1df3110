// The host-side sampler against a float64 reference, its distribution, and the edges of its
// options.
#include "server/sampling/request_sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "server/base/philox.h"
#include "server/sampling/sampler.h"
#include "server/sampling/weights.h"
#include "tests/unit/sampling/reference_sampler.h"

namespace mmfree {
namespace {

using ::testing::Contains;
using ::testing::Not;

using Options = RequestSampler::Options;
using Logprobs = RequestSampler::Logprobs;

std::vector<float> RandomLogits(size_t count, uint64_t seed, float spread) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

SamplingParams At(float temperature, uint64_t seed = 1) {
  SamplingParams params;
  params.temperature = temperature;
  params.seed = seed;
  return params;
}

struct Feature {
  std::string name;
  std::function<void(Options*)> set;
};

const std::vector<Feature>& Features() {
  static const auto* const kFeatures = new std::vector<Feature>{
      {"Plain", [](Options*) {}},
      {"AllowedIds", [](Options* o) { o->allowed = {1, 5, 9, 33, 34, 35, 79}; }},
      {"BannedIds", [](Options* o) { o->banned = {0, 2, 3, 17, 18, 63, 64, 79}; }},
      {"AllowedAndBanned",
       [](Options* o) {
         o->allowed = {3, 4, 5, 6, 70};
         o->banned = {4, 70};
       }},
      {"LogitBias",
       [](Options* o) {
         o->bias = {{4, 3.5f}, {5, -100.0f}, {60, 1.25f}};
       }},
      {"Repetition", [](Options* o) { o->penalties.repetition = 1.7f; }},
      {"RepetitionRewarded", [](Options* o) { o->penalties.repetition = 0.6f; }},
      {"RepetitionShortWindow",
       [](Options* o) {
         o->penalties.repetition = 3.0f;
         o->penalties.repetition_window = 2;
       }},
      {"Frequency", [](Options* o) { o->penalties.frequency = 0.7f; }},
      {"Presence", [](Options* o) { o->penalties.presence = -1.5f; }},
      {"TopK", [](Options* o) { o->filters.top_k = 7; }},
      {"TypicalP", [](Options* o) { o->filters.typical_p = 0.6f; }},
      {"TopP", [](Options* o) { o->filters.top_p = 0.8f; }},
      {"MinP", [](Options* o) { o->filters.min_p = 0.15f; }},
      {"Everything",
       [](Options* o) {
         o->banned = {1, 2, 3};
         o->bias = {{9, 1.0f}};
         o->penalties = {1.2f, 5, 0.3f, 0.2f};
         o->filters = {40, 0.9f, 0.9f, 0.02f};
       }},
  };
  return *kFeatures;
}

class FeatureTest : public testing::TestWithParam<Feature> {
 protected:
  Options MakeOptions() const {
    Options options;
    GetParam().set(&options);
    return options;
  }
  const std::vector<int32_t> context_ = {1, 7, 7, 12, 9, 30};
  const std::vector<int32_t> output_ = {12, 40, 40, 41, 12, 12, 79};

  RequestSampler MakeSampler(const Options& options, size_t vocab) const {
    RequestSampler sampler(options, static_cast<int64_t>(vocab), context_);
    for (const int32_t token : output_) sampler.Append(token);
    return sampler;
  }
};

INSTANTIATE_TEST_SUITE_P(All, FeatureTest, testing::ValuesIn(Features()),
                         [](const auto& info) { return info.param.name; });

TEST_P(FeatureTest, DrawsWhatAFloat64SamplerDraws) {
  const Options options = MakeOptions();
  RequestSampler sampler = MakeSampler(options, 80);
  int compared = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const std::vector<float> logits = RandomLogits(80, seed, 2.0f);
    for (const float temperature : {0.4f, 1.0f, 2.5f}) {
      double margin = 0;
      const std::vector<double> p =
          ReferenceDistribution(logits, options, temperature, context_, output_, &margin);
      if (margin < 1e-5) continue;
      for (uint64_t position = 0; position < 20; ++position) {
        const double u = std::ldexp(static_cast<double>(UniformBits(seed, position, 0, 0)), -64);
        double sum = 0;
        double distance = 1;
        int32_t expected = -1;
        for (size_t i = 0; i < p.size(); ++i) {
          sum += p[i];
          distance = std::min(distance, std::fabs(sum - u));
          if (expected < 0 && sum > u) expected = static_cast<int32_t>(i);
        }
        if (distance < 1e-5) continue;  // either neighbour is right
        ASSERT_EQ(sampler.Sample(logits, At(temperature, seed), position).token, expected)
            << "seed " << seed << " position " << position << " temperature " << temperature;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 3000);
}

TEST_P(FeatureTest, DrawsFollowTheDistribution) {
  constexpr int kDraws = 20'000;
  const Options options = MakeOptions();
  RequestSampler sampler = MakeSampler(options, 80);
  const std::vector<float> logits = RandomLogits(80, 99, 1.5f);
  const std::vector<double> p =
      ReferenceDistribution(logits, options, 0.9, context_, output_, nullptr);
  std::vector<int> counts(p.size(), 0);
  for (int draw = 0; draw < kDraws; ++draw) {
    ++counts[sampler.Sample(logits, At(0.9f, 7), static_cast<uint64_t>(draw)).token];
  }
  double chi_square = 0;
  int bins = 0;
  double rest = 0;
  int rest_count = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0) {
      EXPECT_EQ(counts[i], 0) << i;
    } else if (p[i] * kDraws < 10) {
      rest += p[i] * kDraws;
      rest_count += counts[i];
    } else {
      chi_square += std::pow(counts[i] - p[i] * kDraws, 2) / (p[i] * kDraws);
      ++bins;
    }
  }
  if (rest > 0) {
    chi_square += std::pow(rest_count - rest, 2) / rest;
    ++bins;
  }
  // Mean and deviation of the chi-square distribution; the seed is fixed, so this never flickers.
  const double degrees = std::max(1, bins - 1);
  EXPECT_LT(chi_square, degrees + 4 * std::sqrt(2 * degrees));
}

TEST_P(FeatureTest, GreedyTakesTheLikeliestThatCanBeChosen) {
  const Options options = MakeOptions();
  RequestSampler sampler = MakeSampler(options, 80);
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const std::vector<float> logits = RandomLogits(80, seed, 2.0f);
    // Filters keep the likeliest, except that typical_p may not.
    Options unfiltered = options;
    unfiltered.filters = {};
    const std::vector<double> p =
        ReferenceDistribution(logits, unfiltered, 1.0, context_, output_, nullptr);
    const auto best = std::max_element(p.begin(), p.end()) - p.begin();
    EXPECT_EQ(sampler.Sample(logits, At(0.0f), 5).token, best);
  }
}

TEST_P(FeatureTest, ModelLogprobsAreThoseOfScoring) {
  Options options = MakeOptions();
  options.top_logprobs = 5;
  RequestSampler sampler = MakeSampler(options, 80);
  const std::vector<float> logits = RandomLogits(80, 3, 2.0f);
  for (uint64_t position = 0; position < 20; ++position) {
    const SampledToken sampled = sampler.Sample(logits, At(0.8f), position);
    EXPECT_EQ(sampled.logprob, ScoreToken(logits, sampled.token).logprob);
    ASSERT_EQ(sampled.top->size(), 5u);
    std::vector<float> sorted = logits;
    std::sort(sorted.rbegin(), sorted.rend());
    for (size_t i = 0; i < 5; ++i) {
      const TokenAlternative& alternative = (*sampled.top)[i];
      EXPECT_EQ(logits[alternative.token], sorted[i]);
      EXPECT_EQ(alternative.logprob, ScoreToken(logits, alternative.token).logprob);
    }
  }
}

TEST_P(FeatureTest, SamplingLogprobsAreOfTheDistributionDrawnFrom) {
  Options options = MakeOptions();
  options.logprobs = Logprobs::kSampling;
  options.top_logprobs = 20;
  RequestSampler sampler = MakeSampler(options, 80);
  const std::vector<float> logits = RandomLogits(80, 3, 2.0f);
  const std::vector<double> p =
      ReferenceDistribution(logits, options, 0.8, context_, output_, nullptr);
  for (uint64_t position = 0; position < 20; ++position) {
    const SampledToken sampled = sampler.Sample(logits, At(0.8f), position);
    EXPECT_NEAR(sampled.logprob, std::log(p[sampled.token]), 1e-5);
    float last = 0.0f;
    for (const TokenAlternative& alternative : *sampled.top) {
      EXPECT_NEAR(alternative.logprob, std::log(p[alternative.token]), 1e-5);
      EXPECT_LE(alternative.logprob, last);
      last = alternative.logprob;
    }
  }
  const SampledToken greedy = sampler.Sample(logits, At(0.0f), 0);
  EXPECT_EQ(greedy.logprob, 0.0f);  // nothing else could have been drawn
  ASSERT_EQ(greedy.top->size(), 1u);
  EXPECT_EQ(greedy.top->front().token, greedy.token);
}

// Any options together, over any history: the features meet in every order and at every strength.
TEST(RequestSamplerTest, AnyCombinationDrawsWhatAFloat64SamplerDraws) {
  std::mt19937 random(11);
  const auto below = [&random](size_t end) { return static_cast<int32_t>(random() % end); };
  const auto share = [&random] { return static_cast<float>(random() % 1000 + 1) * 0.001f; };
  int compared = 0;
  for (uint64_t round = 0; round < 600; ++round) {
    const size_t vocab = 2 + random() % 300;
    const auto some_ids = [&](size_t most) {
      std::vector<int32_t> ids(random() % (most + 1));
      for (int32_t& id : ids) id = below(vocab);
      return ids;
    };
    Options options;
    if (random() % 3 == 0) options.allowed = some_ids(vocab);
    if (random() % 3 == 0) options.banned = some_ids(vocab / 2);
    for (int32_t id = below(vocab); random() % 2 == 0;
         id = (id + 1) % static_cast<int32_t>(vocab)) {
      if (options.bias.size() == vocab) break;
      options.bias.emplace_back(id, (share() - 0.5f) * 8.0f);
    }
    if (random() % 2 == 0) options.penalties.repetition = 0.5f + 2.0f * share();
    options.penalties.repetition_window = static_cast<uint32_t>(random() % 40);
    if (random() % 2 == 0) options.penalties.frequency = 2.0f * share() - 1.0f;
    if (random() % 2 == 0) options.penalties.presence = 2.0f * share() - 1.0f;
    if (random() % 3 == 0) options.filters.top_k = static_cast<uint32_t>(random() % (2 * vocab));
    if (random() % 3 == 0) options.filters.typical_p = share();
    if (random() % 3 == 0) options.filters.top_p = share();
    if (random() % 3 == 0) options.filters.min_p = share();
    const std::vector<int32_t> context = some_ids(60);
    const std::vector<int32_t> output = some_ids(60);
    RequestSampler sampler(options, static_cast<int64_t>(vocab), context);
    for (const int32_t token : output) sampler.Append(token);
    const std::vector<float> logits = RandomLogits(vocab, round, 2.0f);
    const float temperature = 0.3f + 2.0f * share();
    double margin = 0;
    const std::vector<double> p =
        ReferenceDistribution(logits, options, temperature, context, output, &margin);
    if (std::isnan(p[0])) {
      EXPECT_EQ(sampler.Sample(logits, At(temperature, round), 0).token, -1) << "nothing is left";
      continue;
    }
    if (margin < 1e-4) continue;
    for (uint64_t position = 0; position < 10; ++position) {
      const double u = std::ldexp(static_cast<double>(UniformBits(round, position, 0, 0)), -64);
      double sum = 0;
      double distance = 1;
      int32_t expected = -1;
      for (size_t i = 0; i < p.size(); ++i) {
        sum += p[i];
        distance = std::min(distance, std::fabs(sum - u));
        if (expected < 0 && sum > u) expected = static_cast<int32_t>(i);
      }
      if (distance < 1e-5) continue;
      ASSERT_EQ(sampler.Sample(logits, At(temperature, round), position).token, expected)
          << "round " << round;
      ++compared;
    }
  }
  EXPECT_GT(compared, 3000);
}

TEST(RequestSamplerTest, WithoutOptionsItIsTheBackendsSampler) {
  for (const size_t vocab : {1, 2, 63, 64, 65, 257, 1025, 4096}) {
    RequestSampler sampler(Options(), static_cast<int64_t>(vocab), {});
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const std::vector<float> logits = RandomLogits(vocab, seed, 4.0f);
      for (const float temperature : {0.0f, 0.3f, 1.0f, 100.0f}) {
        SamplingParams params = At(temperature, seed);
        params.candidate = static_cast<uint32_t>(seed % 3);
        const std::vector<int32_t> banned = {0};
        if (vocab > 1) params.banned = banned;
        const SampledToken expected = Sample(logits, params, seed);
        const SampledToken sampled = sampler.Sample(logits, params, seed);
        EXPECT_EQ(sampled.token, expected.token);
        EXPECT_EQ(sampled.logprob, expected.logprob);
      }
    }
  }
}

TEST(RequestSamplerTest, UnusualLogitsGoToTheTokenOfTheBackendsSampler) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<std::vector<float>> rows = {
      std::vector<float>(40, 1.5f), std::vector<float>(40, kNaN), std::vector<float>(40, -kInf),
      std::vector<float>(40, kInf), {-0.0f, 0.0f, -1.0f},         {kNaN, kNaN, 3.0f, kNaN, 3.0f},
      {1.0f, kInf, kNaN, kInf},     {-3e38f, 3e38f, 1.0f},
  };
  const std::vector<int32_t> banned = {0};
  for (const std::vector<float>& logits : rows) {
    RequestSampler sampler(Options(), static_cast<int64_t>(logits.size()), {});
    for (const float temperature : {0.0f, 1.0f}) {
      SamplingParams params = At(temperature, 9);
      EXPECT_EQ(sampler.Sample(logits, params, 3).token, Sample(logits, params, 3).token);
      params.banned = banned;
      EXPECT_EQ(sampler.Sample(logits, params, 3).token, Sample(logits, params, 3).token);
    }
    Options filtered;
    filtered.filters = {2, 0.5f, 0.5f, 0.5f};
    filtered.penalties = {1.5f, 4, 1.0f, 1.0f};
    RequestSampler all(filtered, static_cast<int64_t>(logits.size()), {});
    const int32_t token = all.Sample(logits, At(1.0f), 3).token;
    EXPECT_GE(token, 0);
    EXPECT_LT(token, static_cast<int32_t>(logits.size()));
  }
}

// One that keeps a single token is greedy; one that keeps all is off.
TEST(RequestSamplerTest, FiltersAreExactAtTheirEdges) {
  const std::vector<Feature> single = {
      {"top_k", [](Options* o) { o->filters.top_k = 1; }},
      {"top_p", [](Options* o) { o->filters.top_p = 0.0f; }},
      {"min_p", [](Options* o) { o->filters.min_p = 1.0f; }},
  };
  const std::vector<Feature> all = {
      {"top_k", [](Options* o) { o->filters.top_k = 500; }},
      {"top_k", [](Options* o) { o->filters.top_k = std::numeric_limits<uint32_t>::max(); }},
      {"top_p", [](Options* o) { o->filters.top_p = 1.0f; }},
      {"typical_p", [](Options* o) { o->filters.typical_p = 1.0f; }},
      {"min_p", [](Options* o) { o->filters.min_p = 1e-30f; }},
  };
  const std::vector<float> logits = RandomLogits(500, 1, 2.0f);
  for (uint64_t position = 0; position < 200; ++position) {
    for (const Feature& feature : single) {
      Options options;
      feature.set(&options);
      RequestSampler sampler(options, 500, {});
      EXPECT_EQ(sampler.Sample(logits, At(3.0f), position).token, ArgMax(logits)) << feature.name;
    }
    for (const Feature& feature : all) {
      Options options;
      feature.set(&options);
      RequestSampler sampler(options, 500, {});
      EXPECT_EQ(sampler.Sample(logits, At(3.0f), position).token,
                Sample(logits, At(3.0f), position).token)
          << feature.name;
    }
  }
}

TEST(RequestSamplerTest, TiesGoToTheLowestIds) {
  const std::vector<float> logits(100, 2.5f);
  for (const auto& set : std::vector<std::function<void(Options*)>>{
           [](Options* o) { o->filters.top_k = 3; },
           [](Options* o) { o->filters.top_p = 0.03f; },
           [](Options* o) { o->filters.typical_p = 0.03f; },
       }) {
    Options options;
    set(&options);
    RequestSampler sampler(options, 100, {});
    std::vector<int> counts(100, 0);
    for (uint64_t position = 0; position < 300; ++position) {
      ++counts[sampler.Sample(logits, At(1.0f), position).token];
    }
    for (int id = 0; id < 100; ++id) EXPECT_EQ(counts[id] > 0, id < 3) << id;
  }
}

TEST(RequestSamplerTest, ExcludedTokensAreNeverDrawnAndNothingLeftIsSaid) {
  Options options;
  options.allowed = {3, 70, 99};
  options.banned = {70};
  RequestSampler sampler(options, 100, {});
  const std::vector<int32_t> end = {3};
  SamplingParams params = At(2.0f);
  for (uint64_t position = 0; position < 100; ++position) {
    EXPECT_THAT(
        (std::vector<int32_t>{3, 99}),
        Contains(sampler.Sample(RandomLogits(100, position, 1.0f), params, position).token));
  }
  params.banned = end;
  EXPECT_EQ(sampler.Sample(RandomLogits(100, 1, 1.0f), params, 1).token, 99);
  // All that is left is a NaN: still the only one that can be chosen.
  std::vector<float> logits(100, 1.0f);
  logits[99] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(sampler.Sample(logits, params, 1).token, 99);
  const std::vector<int32_t> both = {3, 99};
  params.banned = both;
  EXPECT_EQ(sampler.Sample(logits, params, 1).token, -1);
}

TEST(RequestSamplerTest, ACloneGoesOnByItself) {
  Options options;
  options.penalties.frequency = 2.0f;
  options.penalties.repetition = 2.0f;
  const std::vector<float> logits = {1.0f, 0.9f, 0.5f};
  RequestSampler sampler(options, 3, {});
  const auto next = [&logits](RequestSampler* s) { return s->Sample(logits, At(0.0f), 0).token; };
  sampler.Append(0);
  const std::unique_ptr<RequestSampler> clone = sampler.Clone();
  sampler.Append(1);
  EXPECT_EQ(next(&sampler), 2);
  EXPECT_EQ(next(clone.get()), 1);
}

TEST(LogitWeightsTest, AreThoseOfEachLogit) {
  for (const size_t count : {1, 7, 8, 9, 1023, 1024, 1025, 3000}) {
    std::vector<float> logits = RandomLogits(count, count, 20.0f);
    logits[count / 2] = std::numeric_limits<float>::quiet_NaN();
    logits[count / 3] = -std::numeric_limits<float>::infinity();
    std::vector<uint64_t> weights(count);
    const float max = logits[ArgMax(logits)];
    uint64_t sum = 0;
    for (const float inverse : {0.01f, 1.0f, 3.0f}) {
      const uint64_t total = LogitWeights(logits, max, inverse, absl::MakeSpan(weights));
      sum = 0;
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(weights[i], LogitWeight(logits[i], max, inverse)) << i;
        sum += weights[i];
      }
      EXPECT_EQ(total, sum);
    }
  }
}

TEST(TokenMaskTest, KnowsItsMembers) {
  for (const int64_t size : {1, 63, 64, 65, 200}) {
    TokenMask mask(size, true);
    EXPECT_EQ(mask.Count(), size);
    mask.Remove(static_cast<int32_t>(size - 1));
    std::vector<int32_t> missing;
    mask.ForEachMissing([&missing](int32_t id) { missing.push_back(id); });
    EXPECT_EQ(missing, std::vector<int32_t>{static_cast<int32_t>(size - 1)});
    EXPECT_EQ(mask.First(), size == 1 ? -1 : 0);
    TokenMask empty(size, false);
    EXPECT_EQ(empty.First(), -1);
    empty.Add(static_cast<int32_t>(size / 2));
    EXPECT_EQ(empty.First(), size / 2);
    EXPECT_TRUE(empty.Has(static_cast<int32_t>(size / 2)));
    empty.Intersect(mask);
    EXPECT_EQ(empty.Count(), size == 1 ? 0 : 1);
  }
}

}  // namespace
}  // namespace mmfree
