#include "server/scheduler/prompt_lookup.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;

using Ids = std::vector<int32_t>;

TEST(PromptLookup, GivesWhatFollowedTheLatestOfTheLongestMatches) {
  EXPECT_THAT(LookUpContinuation(Ids{1, 2, 3, 4, 5, 9, 1, 2}, 3), ElementsAre(3, 4, 5));
  // The later of two equal ones.
  EXPECT_THAT(LookUpContinuation(Ids{1, 2, 3, 8, 1, 2, 4, 8, 9, 1, 2}, 2), ElementsAre(4, 8));
  // A longer one before a later one.
  EXPECT_THAT(LookUpContinuation(Ids{7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2}, 1), ElementsAre(3));
}

TEST(PromptLookup, WhatOverlapsTheEndRepeats) {
  EXPECT_THAT(LookUpContinuation(Ids{1, 2, 1, 2}, 5), ElementsAre(1, 2, 1, 2, 1));
  EXPECT_THAT(LookUpContinuation(Ids{4, 4, 4}, 4), ElementsAre(4, 4, 4, 4));
}

TEST(PromptLookup, OneTokenInCommonIsNotEnough) {
  EXPECT_THAT(LookUpContinuation(Ids{}, 4), IsEmpty());
  EXPECT_THAT(LookUpContinuation(Ids{1}, 4), IsEmpty());
  EXPECT_THAT(LookUpContinuation(Ids{1, 1}, 4), IsEmpty());
  EXPECT_THAT(LookUpContinuation(Ids{1, 2, 3, 9, 2}, 4), IsEmpty());
  EXPECT_THAT(LookUpContinuation(Ids{1, 2, 1, 2}, 0), IsEmpty());
}

TEST(PromptLookup, LooksBackOverItsWindowAndNoFurther) {
  Ids context = {1, 2, 3};
  for (size_t i = 0; context.size() < kLookupWindow - 2; ++i) {
    context.push_back(static_cast<int32_t>(100 + i));
  }
  context.insert(context.end(), {1, 2});
  ASSERT_EQ(context.size(), kLookupWindow);
  EXPECT_THAT(LookUpContinuation(context, 1), ElementsAre(3));
  context.insert(context.begin() + 10, 99);
  EXPECT_THAT(LookUpContinuation(context, 1), IsEmpty());
}

// The definition, word by word.
Ids Reference(const Ids& context, size_t count) {
  size_t best = 0;
  size_t next = 0;
  for (size_t end = 2; end < context.size(); ++end) {
    size_t common = 0;
    while (common < end && common < 8 &&
           context[end - 1 - common] == context[context.size() - 1 - common]) {
      ++common;
    }
    if (common < 2 || common < best) continue;
    best = common;
    next = end;
  }
  Ids all = context;
  for (size_t i = 0; next > 0 && i < count; ++i) all.push_back(all[next + i]);
  return {all.begin() + static_cast<ptrdiff_t>(context.size()), all.end()};
}

TEST(PromptLookup, IsTheDefinitionOverRandomContexts) {
  std::mt19937 random(3);
  int found = 0;
  for (int round = 0; round < 3000; ++round) {
    Ids context(random() % 60);
    const uint32_t tokens = 1 + random() % 6;
    for (int32_t& token : context) token = static_cast<int32_t>(random() % tokens);
    const size_t count = random() % 17;
    const Ids expected = Reference(context, count);
    found += expected.empty() ? 0 : 1;
    ASSERT_THAT(LookUpContinuation(context, count), ElementsAreArray(expected));
  }
  EXPECT_GT(found, 1000);
}

}  // namespace
}  // namespace mmfree
