#include "server/scheduler/queued_prompts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace mmfree {
namespace {

struct Queued {
  std::string space;
  std::vector<int32_t> tokens;
  int64_t cached = 0;

  QueuedPrompts::Prompt prompt() const { return {space, tokens, cached}; }
};

// Tokens to feed, each common beginning once, by hand.
int64_t Together(const std::vector<Queued>& prompts) {
  std::set<std::pair<std::string, std::vector<int32_t>>> beginnings;
  int64_t own = 0;
  for (const Queued& one : prompts) {
    const int64_t end = static_cast<int64_t>(one.tokens.size()) - 1;
    ++own;
    for (int64_t length = one.cached + 1; length <= end; ++length) {
      if (one.space.empty()) {
        ++own;
        continue;
      }
      // Of those with another state to start from, nothing is shared.
      beginnings.insert({one.space + " " + std::to_string(one.cached),
                         {one.tokens.begin(), one.tokens.begin() + length}});
    }
  }
  return own + static_cast<int64_t>(beginnings.size());
}

TEST(QueuedPromptsTest, ACommonBeginningCountsOnceAndTheLastTokenAlways) {
  QueuedPrompts queued;
  const Queued first = {"s", {1, 2, 3, 4}};
  EXPECT_EQ(queued.Added(first.prompt()), 4);
  queued.Add(first.prompt());
  EXPECT_EQ(queued.Added(first.prompt()), 1);
  EXPECT_EQ(queued.Added(Queued{"s", {1, 2, 9, 4}}.prompt()), 2);
  EXPECT_EQ(queued.Added(Queued{"t", {1, 2, 3, 4}}.prompt()), 4);
  EXPECT_EQ(queued.Added(Queued{"", {1, 2, 3, 4}}.prompt()), 4);
  EXPECT_EQ(queued.Added(Queued{"s", {1, 2, 3, 4}, 2}.prompt()), 2);
  // Whoever leaves first, what the others need stays.
  const Queued second = {"s", {1, 2, 3, 4, 5}};
  queued.Add(second.prompt());
  EXPECT_EQ(queued.Remove(first.prompt()), 1);
  EXPECT_EQ(queued.Remove(second.prompt()), 5);
  EXPECT_TRUE(queued.empty());
}

TEST(QueuedPromptsTest, TheSumIsThatOfAllBeginningsWhateverComesAndGoes) {
  std::mt19937_64 random(3);
  const auto uniform = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  QueuedPrompts queued;
  std::vector<Queued> present;
  int64_t sum = 0;
  for (int i = 0; i < 2000; ++i) {
    if (present.empty() || (uniform(0, 9) < 6 && present.size() < 40)) {
      Queued one;
      one.space = std::string(static_cast<size_t>(uniform(0, 2)), 's');
      // Of two tokens, so that beginnings meet.
      for (int64_t n = uniform(1, 12); n > 0; --n) one.tokens.push_back(uniform(0, 1));
      if (!one.space.empty() && uniform(0, 2) == 0) {
        one.cached = uniform(0, static_cast<int64_t>(one.tokens.size()) - 1);
      }
      sum += queued.Added(one.prompt());
      queued.Add(one.prompt());
      present.push_back(std::move(one));
    } else {
      std::swap(present[static_cast<size_t>(uniform(0, static_cast<int64_t>(present.size()) - 1))],
                present.back());
      sum -= queued.Remove(present.back().prompt());
      present.pop_back();
    }
    ASSERT_EQ(sum, Together(present)) << "after " << i;
  }
  for (const Queued& one : present) sum -= queued.Remove(one.prompt());
  EXPECT_EQ(sum, 0);
  EXPECT_TRUE(queued.empty());
}

}  // namespace
}  // namespace mmfree
