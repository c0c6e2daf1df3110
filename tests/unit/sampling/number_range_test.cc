// Numbers within bounds: exactly those, against comparing each.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/sampling/decimal_range.h"
#include "server/sampling/integer_range.h"
#include "server/sampling/multiples_range.h"
#include "tests/support/status_is.h"
#include "tests/unit/sampling/grammar_matcher.h"

namespace mmfree {
namespace {

TEST(IntegersBetweenTest, AreExactlyThose) {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    int64_t low = static_cast<int64_t>(random() % 2500) - 1250;
    int64_t high = static_cast<int64_t>(random() % 2500) - 1250;
    if (low > high) std::swap(low, high);
    Grammar grammar;
    const Grammar::Rule root = grammar.AddRule();
    grammar.AddAlternative(root, IntegersBetween(low, high, &grammar));
    ASSERT_THAT(grammar.Finish(root), IsOk());
    GrammarMachine machine(grammar);
    for (int64_t value = -1300; value <= 1300; ++value) {
      GrammarMachine::State state = machine.start();
      for (const char byte : absl::StrCat(value)) {
        state = machine.Next(state, static_cast<unsigned char>(byte));
      }
      ASSERT_EQ(machine.accepting(state), low <= value && value <= high)
          << value << " in [" << low << ", " << high << "]";
    }
    for (const char* text : {"", "-", "-0", "00", "01", "+1"}) {
      EXPECT_FALSE(Matches(grammar, text)) << text;
    }
  }
}

TEST(MultiplesBetweenTest, AreExactlyThose) {
  std::mt19937 random(6);
  for (int round = 0; round < 100; ++round) {
    int64_t low = static_cast<int64_t>(random() % 2500) - 1250;
    int64_t high = static_cast<int64_t>(random() % 2500) - 1250;
    if (low > high) std::swap(low, high);
    const auto divisor = static_cast<int32_t>(1 + random() % kMaxDivisor);
    Grammar grammar;
    const Grammar::Rule root = grammar.AddRule();
    const std::optional<Grammar::Sequence> numbers = MultiplesBetween(low, high, divisor, &grammar);
    int64_t expected = 0;
    for (int64_t value = low; value <= high; ++value) expected += value % divisor == 0 ? 1 : 0;
    ASSERT_EQ(numbers.has_value(), expected > 0) << low << " " << high << " " << divisor;
    if (!numbers.has_value()) continue;
    grammar.AddAlternative(root, *numbers);
    ASSERT_THAT(grammar.Finish(root), IsOk());
    GrammarMachine machine(grammar);
    for (int64_t value = -1300; value <= 1300; ++value) {
      ASSERT_EQ(Matches(&machine, absl::StrCat(value)),
                low <= value && value <= high && value % divisor == 0)
          << value << " of " << divisor << " in [" << low << ", " << high << "]";
    }
    for (const char* text : {"", "-", "-0", "00", "0200"}) EXPECT_FALSE(Matches(&machine, text));
  }
  Grammar largest;
  const Grammar::Rule root = largest.AddRule();
  largest.AddAlternative(
      root, *MultiplesBetween(-999'999'999'999'999, 999'999'999'999'999, kMaxDivisor, &largest));
  ASSERT_THAT(largest.Finish(root), IsOk());
  EXPECT_TRUE(Matches(largest, "123456789012400"));
  EXPECT_FALSE(Matches(largest, "123456789012300"));
}

// With a point in some places, so that the bounds fall between, on and beside what is tried.
double RandomBound(std::mt19937* random) {
  const auto value = static_cast<double>(static_cast<int32_t>((*random)() % 4001) - 2000);
  return value / std::pow(10.0, static_cast<double>((*random)() % 5));
}

bool Within(double value, const std::optional<DecimalBound>& low,
            const std::optional<DecimalBound>& high) {
  if (low.has_value() && (low->exclusive ? value <= low->value : value < low->value)) return false;
  return !high.has_value() || (high->exclusive ? value < high->value : value <= high->value);
}

TEST(DecimalsBetweenTest, AreExactlyThose) {
  std::mt19937 random(4);
  int within = 0;
  int tried = 0;
  for (int round = 0; round < 300; ++round) {
    std::optional<DecimalBound> low, high;
    if (random() % 4 > 0) low = {RandomBound(&random), random() % 2 == 0};
    if (random() % 4 > 0) high = {RandomBound(&random), random() % 2 == 0};
    Grammar grammar;
    const Grammar::Rule root = grammar.AddRule();
    const std::optional<Grammar::Sequence> numbers = DecimalsBetween(low, high, &grammar);
    ASSERT_EQ(numbers.has_value(),
              !low.has_value() || !high.has_value() || low->value < high->value ||
                  (low->value == high->value && !low->exclusive && !high->exclusive))
        << low->value << " " << high->value;
    if (!numbers.has_value()) continue;
    grammar.AddAlternative(root, *numbers);
    ASSERT_THAT(grammar.Finish(root), IsOk());
    GrammarMachine machine(grammar);
    for (int i = 0; i < 400; ++i) {
      // Half of them close to a bound.
      double value = RandomBound(&random);
      const std::optional<DecimalBound>& near = random() % 2 == 0 ? low : high;
      if (near.has_value() && random() % 2 == 0) {
        value = near->value + static_cast<double>(static_cast<int>(random() % 5) - 2) * 1e-4;
      }
      char text[40];
      snprintf(text, sizeof(text), "%.*f", static_cast<int>(random() % 6), value);
      if (text[0] == '-' && std::strtod(text, nullptr) == 0) continue;  // "-0.0"
      const bool expected = Within(std::strtod(text, nullptr), low, high);
      ASSERT_EQ(Matches(&machine, text), expected) << text << " round " << round;
      within += expected ? 1 : 0;
      ++tried;
    }
    for (const char* text : {"", "-", "-0", "-0.0", "00", "01.5", ".5", "1.", "+1", "1e0"}) {
      EXPECT_FALSE(Matches(&machine, text)) << text;
    }
  }
  EXPECT_GT(within, tried / 5);
  EXPECT_LT(within, tried * 4 / 5);
}

// Outputs of the machine, whatever it leads to, are within the bounds as binary64 has them.
TEST(DecimalsBetweenTest, ExtremeBoundsHold) {
  std::mt19937 random(5);
  const std::optional<DecimalBound> none;
  const auto at = [](double value, bool exclusive = false) {
    return std::optional<DecimalBound>({value, exclusive});
  };
  const std::pair<std::optional<DecimalBound>, std::optional<DecimalBound>> kBounds[] = {
      {at(0.1), at(0.1)},
      {at(0.1, true), at(0.2, true)},
      {at(0, true), at(1e-9)},
      {at(-1e300), at(1e300)},
      {at(999999999999998.5), none},
      {none, at(-123456789012345.0)},
      {at(0.1 + 0.2), none},
      {at(1.0 / 3, true), at(0.34)},
      {at(-5e-324), at(5e-324)},
      {at(1e15 - 1), at(1e15)},
      {at(2.5), none},
      {none, at(-0.0)}};
  for (const auto& [low, high] : kBounds) {
    Grammar grammar;
    const Grammar::Rule root = grammar.AddRule();
    const std::optional<Grammar::Sequence> numbers = DecimalsBetween(low, high, &grammar);
    ASSERT_TRUE(numbers.has_value());
    grammar.AddAlternative(root, *numbers);
    ASSERT_THAT(grammar.Finish(root), IsOk());
    GrammarMachine machine(grammar);
    for (int walk = 0; walk < 300; ++walk) {
      std::string text;
      GrammarMachine::State state = machine.start();
      for (;;) {
        if (machine.accepting(state)) {
          ASSERT_TRUE(Within(std::strtod(text.c_str(), nullptr), low, high)) << text;
        }
        std::string choices;
        for (const char c : {'-', '.', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'}) {
          if (machine.Next(state, static_cast<unsigned char>(c)) != GrammarMachine::kDead) {
            choices += c;
          }
        }
        if (choices.empty()) break;
        text += choices[random() % choices.size()];
        state = machine.Next(state, static_cast<unsigned char>(text.back()));
      }
      ASSERT_TRUE(machine.accepting(state)) << text;
      ASSERT_LE(text.size(), 18u) << text;
    }
  }
  Grammar grammar;
  for (const auto& [low, high] : {std::make_pair(at(1e15), none), std::make_pair(none, at(-1e15)),
                                  std::make_pair(at(1e-20), at(2e-20))}) {
    EXPECT_FALSE(DecimalsBetween(low, high, &grammar).has_value());
  }
}

}  // namespace
}  // namespace mmfree
