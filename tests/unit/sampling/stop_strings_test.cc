// The automaton against a search that tries every string at every place.
#include "server/sampling/stop_strings.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"

namespace mmfree {
namespace {

std::string RandomText(std::mt19937* random, size_t size, char letters) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    text.push_back(static_cast<char>('a' + (*random)() % static_cast<unsigned>(letters)));
  }
  return text;
}

TEST(StopStringsTest, FindsAndExpectsWhatANaiveSearchDoes) {
  std::mt19937 random(1);
  for (int round = 0; round < 400; ++round) {
    std::vector<std::string> strings;
    for (size_t i = 0; i <= random() % 8; ++i) {
      strings.push_back(RandomText(&random, 1 + random() % 6, 3));
    }
    const StopStrings automaton(strings);
    const std::string text = RandomText(&random, 60, 3);
    StopStrings::Node node = StopStrings::kStart;
    for (size_t end = 1; end <= text.size(); ++end) {
      node = automaton.Next(node, text[end - 1]);
      const std::string read = text.substr(0, end);
      size_t longest = 0;
      size_t pending = 0;
      for (const std::string& string : strings) {
        if (absl::EndsWith(read, string)) longest = std::max(longest, string.size());
        for (size_t size = 1; size <= string.size(); ++size) {
          if (absl::EndsWith(read, string.substr(0, size))) pending = std::max(pending, size);
        }
      }
      ASSERT_EQ(automaton.pending(node), pending);
      ASSERT_EQ(automaton.match(node) >= 0, longest > 0);
      if (longest > 0) {
        const auto first = std::find(strings.begin(), strings.end(), read.substr(end - longest));
        ASSERT_EQ(automaton.match(node), first - strings.begin());
      }
    }
  }
}

TEST(StopStringsTest, TakesTheLargestSetsThatARequestMayBring) {
  std::mt19937 random(2);
  std::vector<std::string> strings;
  for (int i = 0; i < 64; ++i) strings.push_back(RandomText(&random, 1024, 26));
  const StopStrings automaton(strings);
  StopStrings::Node node = StopStrings::kStart;
  for (const char byte : "some text, then " + strings[40]) node = automaton.Next(node, byte);
  EXPECT_EQ(automaton.match(node), 40);
}

}  // namespace
}  // namespace mmfree
