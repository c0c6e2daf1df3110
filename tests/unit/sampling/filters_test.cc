// What each filter keeps, exactly, against sorting all candidates and adding them up.
#include "server/sampling/filters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "server/sampling/sampler.h"

namespace mmfree {
namespace {

using Candidates = std::vector<Candidate>;
using Before = std::function<bool(const Candidate&, const Candidate&)>;

constexpr float kInverseTemperature = 1.25f;

// `distinct` values: few of them make many ties.
Candidates RandomCandidates(size_t count, uint32_t distinct, std::mt19937* random) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> values(distinct);
  for (float& value : values) value = normal(*random);
  const float max = *std::max_element(values.begin(), values.end());
  Candidates candidates;
  for (size_t id = 0; id < count; ++id) {
    const float logit = id == count / 2 ? max : values[(*random)() % distinct];
    const uint64_t weight = LogitWeight(logit, max, kInverseTemperature);
    if (weight > 0) candidates.push_back({static_cast<int32_t>(id), logit, weight});
  }
  return candidates;
}

float MaxLogit(const Candidates& candidates) {
  float max = candidates[0].logit;
  for (const Candidate& c : candidates) max = std::max(max, c.logit);
  return max;
}

uint64_t Total(const Candidates& candidates) {
  uint64_t total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  return total;
}

bool Likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// The shortest prefix that weighs `target` or more, one candidate at least.
Candidates Prefix(Candidates candidates, uint64_t target, const Before& before) {
  std::sort(candidates.begin(), candidates.end(), before);
  size_t kept = 0;
  for (uint64_t sum = 0; kept == 0 || (kept < candidates.size() && sum < target);) {
    sum += candidates[kept++].weight;
  }
  candidates.resize(kept);
  return candidates;
}

Candidates Typical(const Candidates& candidates, float share, float max) {
  const auto information = [max](const Candidate& c) {
    return static_cast<uint64_t>((max - c.logit) * kInverseTemperature * 16777216.0f);
  };
  __extension__ unsigned __int128 moment = 0;
  for (const Candidate& c : candidates) {
    __extension__ const unsigned __int128 weight = c.weight;
    moment += weight * information(c);
  }
  const auto mean = static_cast<int64_t>(static_cast<uint64_t>(moment / Total(candidates)));
  const auto distance = [&](const Candidate& c) {
    return std::abs(static_cast<int64_t>(information(c)) - mean);
  };
  return Prefix(candidates, ShareOf(FixedShare(share), Total(candidates)),
                [&](const Candidate& a, const Candidate& b) {
                  return distance(a) != distance(b) ? distance(a) < distance(b) : a.id < b.id;
                });
}

std::set<int32_t> Ids(const Candidates& candidates) {
  std::set<int32_t> ids;
  for (const Candidate& c : candidates) ids.insert(c.id);
  return ids;
}

TEST(FiltersTest, KeepExactlyThePrefixOfASort) {
  std::mt19937 random(1);
  for (const size_t count : {1, 2, 100, 511, 512, 513, 514, 3000, 20'000}) {
    for (const uint32_t distinct : {1u, 3u, 200u, 100'000u}) {
      const Candidates all = RandomCandidates(count, distinct, &random);
      const float max = MaxLogit(all);
      const auto filtered = [&](const FilterOptions& options) {
        Candidates kept = all;
        ApplyFilters(options, max, kInverseTemperature, &kept);
        return Ids(kept);
      };
      for (const uint32_t k : {1u, 2u, 40u, 600u, 19'999u}) {
        Candidates sorted = all;
        std::sort(sorted.begin(), sorted.end(), Likelier);
        sorted.resize(std::min<size_t>(k, sorted.size()));
        EXPECT_EQ(filtered({.top_k = k}), Ids(sorted)) << count << " " << distinct << " " << k;
      }
      for (const float p : {0.0f, 1e-6f, 0.1f, 0.5f, 0.9f, 0.999f}) {
        EXPECT_EQ(filtered({.top_p = p}),
                  Ids(Prefix(all, ShareOf(FixedShare(p), Total(all)), Likelier)))
            << count << " " << distinct << " top_p " << p;
        if (p == 0.0f) continue;
        const Candidates typical = Typical(all, p, max);
        EXPECT_EQ(filtered({.typical_p = p}), Ids(typical))
            << count << " " << distinct << " typical_p " << p;
        // The likeliest may be gone by now; one stays all the same.
        EXPECT_EQ(filtered({.typical_p = p, .top_p = 0.0f}), Ids(Prefix(typical, 0, Likelier)));
      }
    }
  }
}

TEST(FiltersTest, ZerosOfBothSignsAreTies) {
  Candidates all;
  for (int32_t id = 0; id < 1000; ++id) {
    all.push_back({id, id % 3 == 0 ? -0.0f : 0.0f, LogitWeight(0.0f, 0.0f, 1.0f)});
  }
  for (const float max : {0.0f, -0.0f}) {
    for (const FilterOptions& options : {FilterOptions{.top_k = 600}, FilterOptions{.top_p = 0.6f},
                                         FilterOptions{.typical_p = 0.6f}}) {
      Candidates kept = all;
      ApplyFilters(options, max, 1.0f, &kept);
      const std::set<int32_t> ids = Ids(kept);
      EXPECT_EQ(*ids.rbegin() + 1, static_cast<int32_t>(ids.size())) << "not the lowest ids";
      EXPECT_NEAR(static_cast<double>(ids.size()), 600, 1);
    }
  }
}

}  // namespace
}  // namespace mmfree
