#include "server/prefix_cache/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace mmfree {
namespace {

using Tokens = std::vector<int32_t>;

constexpr int64_t kRoomy = int64_t{1} << 30;

SharedState State(float value, size_t floats = 4) {
  return std::make_shared<const std::vector<float>>(floats, value);
}

Tokens Sequence(int32_t first, int count) {
  Tokens tokens;
  for (int32_t i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

TEST(PrefixCacheTest, FindsTheLongestCheckpointAndWhereTheTokensPart) {
  PrefixCache cache(kRoomy, nullptr);
  const Tokens a = Sequence(0, 100);
  cache.Insert("s", absl::MakeConstSpan(a).first(40), State(40));
  cache.Insert("s", a, State(100));

  Tokens b = a;
  b[70] = 1000;
  const PrefixCache::Hit parted = cache.Find("s", b);
  EXPECT_EQ(parted.tokens, 40);
  EXPECT_EQ(*parted.state, *State(40));
  EXPECT_EQ(parted.common, 70);

  EXPECT_EQ(cache.Find("s", a).tokens, 100);
  EXPECT_EQ(cache.Find("s", absl::MakeConstSpan(a).first(39)).tokens, 0);
  EXPECT_EQ(cache.Find("s", absl::MakeConstSpan(a).first(39)).common, 39);
  b[0] = 1000;
  EXPECT_EQ(cache.Find("s", b).common, 0);
  EXPECT_EQ(cache.Peek("s", a), 100);
}

TEST(PrefixCacheTest, SpacesShareNothing) {
  PrefixCache cache(kRoomy, nullptr);
  const Tokens tokens = Sequence(0, 50);
  const std::vector<std::string> spaces = {
      PrefixSpace("d", "alice", ""),  PrefixSpace("d", "bob", ""),
      PrefixSpace("d", "alic", "e"),  PrefixSpace("d", "", "alice"),
      PrefixSpace("d2", "alice", ""), PrefixSpace("d", "alice", "salt"),
      PrefixSpace("", "", "")};
  EXPECT_EQ(std::set<std::string>(spaces.begin(), spaces.end()).size(), spaces.size());
  for (size_t i = 0; i < spaces.size(); ++i) {
    EXPECT_EQ(cache.Find(spaces[i], tokens).common, 0) << spaces[i];
    EXPECT_EQ(cache.Peek(spaces[i], tokens), 0) << spaces[i];
    cache.Insert(spaces[i], tokens, State(static_cast<float>(i)));
  }
  for (size_t i = 0; i < spaces.size(); ++i) {
    EXPECT_EQ(*cache.Find(spaces[i], tokens).state, *State(static_cast<float>(i)));
  }
}

TEST(PrefixCacheTest, TheLeastRecentlyUsedLeavesFirst) {
  PrefixCache cache(3 * 4096 + 2048, nullptr);
  const auto tokens = [](int i) { return Sequence(1000 * i, 20); };
  for (int i = 0; i < 3; ++i) cache.Insert("s", tokens(i), State(0, 1024));
  EXPECT_EQ(cache.checkpoints(), 3);
  EXPECT_EQ(cache.Find("s", tokens(0)).tokens, 20);
  EXPECT_EQ(cache.Peek("s", tokens(1)), 20);  // leaves no trace
  cache.Insert("s", tokens(3), State(0, 1024));
  EXPECT_EQ(cache.Peek("s", tokens(0)), 20);
  EXPECT_EQ(cache.Peek("s", tokens(1)), 0);
  cache.Insert("s", tokens(2), State(0, 1024));  // again: used
  cache.Insert("s", tokens(4), State(0, 1024));
  EXPECT_EQ(cache.Peek("s", tokens(2)), 20);
  EXPECT_EQ(cache.Peek("s", tokens(0)), 0);
}

TEST(PrefixCacheTest, AStateInUseOutlivesItsEviction) {
  PrefixCache cache(8000, nullptr);
  cache.Insert("s", Sequence(0, 10), State(7, 1024));
  const PrefixCache::Hit hit = cache.Find("s", Sequence(0, 10));
  cache.Insert("s", Sequence(500, 10), State(8, 1024));
  EXPECT_EQ(cache.Peek("s", Sequence(0, 10)), 0);
  EXPECT_EQ(*hit.state, *State(7, 1024));
}

TEST(PrefixCacheTest, ACheckpointBeyondTheBudgetIsNotKeptAndDrivesNothingOut) {
  PrefixCache cache(8000, nullptr);
  cache.Insert("s", Sequence(0, 10), State(1, 1024));
  cache.Insert("s", Sequence(500, 10), State(2, 4096));
  EXPECT_EQ(cache.Peek("s", Sequence(0, 10)), 10);
  EXPECT_EQ(cache.Peek("s", Sequence(500, 10)), 0);
  EXPECT_EQ(PrefixCache(0, nullptr).bytes(), 0);
}

// Against a plain map: whatever is found is the right state of a true prefix, nothing longer was
// kept, and the budget holds at every moment.
TEST(PrefixCacheTest, EveryHitIsTheLongestKeptPrefixWithinTheBudget) {
  for (uint32_t seed = 0; seed < 10; ++seed) {
    std::mt19937 random(seed);
    const int64_t budget = seed % 2 == 0 ? kRoomy : 20'000;
    PrefixCache cache(budget, nullptr);
    std::map<std::pair<std::string, Tokens>, float> inserted;
    std::vector<Tokens> prompts;
    for (int i = 0; i < 500; ++i) {
      Tokens tokens;
      if (!prompts.empty() && random() % 4 != 0) {
        tokens = prompts[random() % prompts.size()];
        tokens.resize(1 + random() % tokens.size());
      }
      const size_t more = 1 + random() % 60;
      for (size_t t = 0; t < more; ++t) tokens.push_back(static_cast<int32_t>(random() % 3));
      prompts.push_back(tokens);
      const std::string space(1, static_cast<char>('a' + random() % 2));

      const PrefixCache::Hit hit = cache.Find(space, tokens);
      int64_t longest = 0;
      for (const auto& [key, value] : inserted) {
        const Tokens& kept = key.second;
        if (key.first == space && kept.size() <= tokens.size() &&
            std::equal(kept.begin(), kept.end(), tokens.begin())) {
          longest = std::max(longest, static_cast<int64_t>(kept.size()));
        }
      }
      ASSERT_LE(hit.tokens, longest);
      if (budget == kRoomy) {
        ASSERT_EQ(hit.tokens, longest);
      }
      ASSERT_GE(hit.common, hit.tokens);
      if (hit.tokens > 0) {
        const Tokens prefix(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(hit.tokens));
        ASSERT_EQ(hit.state->front(), inserted.at({space, prefix}));
      }
      const size_t at = 1 + random() % tokens.size();
      tokens.resize(at);
      const float value = inserted.emplace(std::pair(space, tokens), static_cast<float>(i))
                              .first->second;  // the state of given tokens is always the same
      cache.Insert(space, tokens, State(value, 16));
      ASSERT_LE(cache.bytes(), budget);
    }
  }
}

TEST(PrefixCacheTest, WhatIsCountedIsWhatTheStatesTokensAndNamesTake) {
  PrefixCache cache(kRoomy, nullptr);
  EXPECT_EQ(cache.bytes(), 0);
  const Tokens tokens = Sequence(0, 1000);
  cache.Insert(std::string(500, 's'), absl::MakeConstSpan(tokens).first(600), State(1, 3000));
  const int64_t one = cache.bytes();
  EXPECT_GE(one, 3000 * 4 + 600 * 4 + 500);
  EXPECT_LE(one, 3000 * 4 + 600 * 4 + 2 * 500 + 1024);
  cache.Insert(std::string(500, 's'), tokens, State(1, 3000));
  EXPECT_GE(cache.bytes() - one, 3000 * 4 + 400 * 4);
  EXPECT_LE(cache.bytes() - one, 3000 * 4 + 400 * 4 + 512);
}

TEST(PrefixCacheTest, ThreadsMayUseItAtOnce) {
  PrefixCache cache(50'000, nullptr);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&cache, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 2000; ++i) {
        const int32_t first = static_cast<int32_t>(random() % 5);
        const Tokens tokens = Sequence(first, 1 + static_cast<int>(random() % 50));
        const PrefixCache::Hit hit = cache.Find("s", tokens);
        if (hit.tokens > 0) {
          EXPECT_EQ(hit.state->front(), static_cast<float>(int64_t{1000} * first + hit.tokens));
        }
        cache.Peek("s", tokens);
        cache.Insert(
            "s", tokens,
            State(static_cast<float>(size_t{1000} * static_cast<size_t>(first) + tokens.size()),
                  64));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(cache.bytes(), 50'000);
}

}  // namespace
}  // namespace mmfree
