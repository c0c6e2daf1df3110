// What is said where no token is left.
#include "server/sampling/dead_end.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "server/sampling/request_sampler.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int32_t kEos = 2;
constexpr int32_t kA = 3;
constexpr int32_t kB = 4;
constexpr int32_t kOtherB = 5;

Vocabulary LetterVocabulary() {
  const auto trie =
      std::make_shared<const TokenTrie>(std::vector<std::string>{"", "", "", "a", "b", "b"});
  return {trie, trie};
}

struct Limits {
  std::vector<int32_t> allowed = {};
  std::vector<int32_t> banned = {};
  std::vector<int32_t> stops = {};
};

std::vector<Exclusion> AfterA(const char* regex, const Limits& limits) {
  ConstraintCache cache(LetterVocabulary);
  const auto constraint = cache.Compile(ConstraintCache::Kind::kRegex, regex);
  EXPECT_THAT(constraint, IsOk());
  RequestSampler::Options options;
  options.allowed = limits.allowed;
  options.banned = limits.banned;
  options.constraint = *constraint;
  options.end_tokens = limits.stops;
  options.end_tokens.push_back(kEos);
  RequestSampler sampler(options, 6, {});
  sampler.Append(kA);
  const std::vector<float> logits(6, 0.0f);
  EXPECT_LT(sampler.Sample(logits, {}, 0).token, 0);
  return sampler.WhyNothing({});
}

TEST(DeadEndTest, NamesTheConstraintAndWhatElseLeftNothing) {
  const std::vector<int32_t> a = {kA};
  const std::vector<int32_t> b = {kB, kOtherB};
  EXPECT_THAT(AfterA("ac", {}), ElementsAre(Exclusion::kConstraint));
  EXPECT_THAT(AfterA("ac", {.allowed = a}), ElementsAre(Exclusion::kConstraint));
  EXPECT_THAT(AfterA("ab", {.allowed = a}),
              ElementsAre(Exclusion::kConstraint, Exclusion::kAllowedIds));
  EXPECT_THAT(AfterA("a", {.allowed = a}),
              ElementsAre(Exclusion::kConstraint, Exclusion::kAllowedIds));
  EXPECT_THAT(AfterA("ab", {.banned = b}),
              ElementsAre(Exclusion::kConstraint, Exclusion::kBannedIds));
  EXPECT_THAT(AfterA("ab", {.stops = b}),
              ElementsAre(Exclusion::kConstraint, Exclusion::kStopTokens));
  // One alone would not do.
  EXPECT_THAT(AfterA("ab", {.allowed = a, .banned = b}),
              ElementsAre(Exclusion::kConstraint, Exclusion::kAllowedIds, Exclusion::kBannedIds));
}

TEST(DeadEndTest, GoesWithAStatus) {
  absl::Status status = absl::InvalidArgumentError("nothing");
  EXPECT_THAT(TakeExclusions(&status), IsEmpty());
  SetExclusions({Exclusion::kConstraint, Exclusion::kStopTokens}, &status);
  EXPECT_THAT(TakeExclusions(&status), ElementsAre(Exclusion::kConstraint, Exclusion::kStopTokens));
  EXPECT_THAT(TakeExclusions(&status), IsEmpty());
}

}  // namespace
}  // namespace mmfree
