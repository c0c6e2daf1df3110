#include "server/sampling/decimal_range.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "server/sampling/integer_range.h"

namespace mmfree {
namespace {

using Sequence = Grammar::Sequence;

constexpr int kMaxDigits = 15;
constexpr int kUnboundedDigits = 9;  // before the point

// A bound of what is not negative, in decimal.
struct Limit {
  int64_t integer = 0;
  std::string fraction;  // digits without zeros at the end
  bool exclusive = false;
};

// What is left of a limit when digits equal to its own have been written; nullopt: it holds
// whatever follows.
struct Rest {
  std::string digits;
  bool exclusive;
};

int64_t PowerOfTen(int exponent) {
  int64_t power = 1;
  while (exponent-- > 0) power *= 10;
  return power;
}

int DigitsOf(int64_t integer) { return static_cast<int>(absl::StrCat(integer).size()); }

// `magnitude` below 10^kMaxDigits.
Limit LimitOf(double magnitude, bool exclusive) {
  // The shortest digits that are this number: at most 309 before and 1074 after the point.
  char buffer[1500];
  const std::to_chars_result end =
      std::to_chars(buffer, buffer + sizeof(buffer), magnitude, std::chars_format::fixed);
  const std::string text(buffer, end.ptr);
  const size_t point = std::min(text.find('.'), text.size());
  Limit limit;
  (void)absl::SimpleAtoi(text.substr(0, point), &limit.integer);
  if (point < text.size()) limit.fraction = text.substr(point + 1);
  while (!limit.fraction.empty() && limit.fraction.back() == '0') limit.fraction.pop_back();
  limit.exclusive = exclusive;
  return limit;
}

class Fractions {
 public:
  // Of at most so many digits.
  Fractions(int digits, Grammar* grammar) : digits_(digits), grammar_(grammar) {}

  // What may follow an integer: nothing or a point and digits. Nullopt: nothing fits.
  std::optional<Sequence> Suffix(const std::optional<Rest>& low,
                                 const std::optional<Rest>& high) const {
    std::vector<Sequence> alternatives;
    if (MayEnd(low, high)) alternatives.emplace_back();
    if (std::optional<Sequence> digits = Digits(low, high, digits_); digits.has_value()) {
      Sequence sequence = grammar_->Bytes(".");
      sequence.insert(sequence.end(), digits->begin(), digits->end());
      alternatives.push_back(std::move(sequence));
    }
    if (alternatives.empty()) return std::nullopt;
    return grammar_->OneOf(std::move(alternatives));
  }

 private:
  // Whether nothing but zeros to come is within the limits.
  static bool MayEnd(const std::optional<Rest>& low, const std::optional<Rest>& high) {
    if (low.has_value() && (!low->digits.empty() || low->exclusive)) return false;
    return !high.has_value() || !high->digits.empty() || !high->exclusive;
  }

  // One to `count` digits.
  std::optional<Sequence> Digits(const std::optional<Rest>& low, const std::optional<Rest>& high,
                                 int count) const {
    if (count == 0) return std::nullopt;
    if (high.has_value() && high->digits.empty() && high->exclusive) return std::nullopt;
    const char first = low.has_value() && !low->digits.empty() ? low->digits[0] : '0';
    const char last = !high.has_value() ? '9' : high->digits.empty() ? '0' : high->digits[0];
    std::vector<Sequence> alternatives;
    CodePoints free;  // digits that settle it
    for (char digit = first; digit <= last; ++digit) {
      const std::optional<Rest> low_rest = RestAfter(low, digit == first);
      const std::optional<Rest> high_rest = RestAfter(high, digit == last);
      const uint32_t point = static_cast<unsigned char>(digit);
      if (!low_rest.has_value() && !high_rest.has_value()) {
        free.emplace_back(point, point);
        continue;
      }
      std::vector<Sequence> more;
      if (MayEnd(low_rest, high_rest)) more.emplace_back();
      if (auto digits = Digits(low_rest, high_rest, count - 1); digits.has_value()) {
        more.push_back(*std::move(digits));
      }
      if (more.empty()) continue;
      Sequence sequence = grammar_->Character({{point, point}});
      const Sequence rest = grammar_->OneOf(std::move(more));
      sequence.insert(sequence.end(), rest.begin(), rest.end());
      alternatives.push_back(std::move(sequence));
    }
    if (!free.empty()) {
      Sequence sequence = grammar_->Character(free);
      const Sequence rest = grammar_->Repeat(grammar_->Character({{'0', '9'}}), 0, count - 1);
      sequence.insert(sequence.end(), rest.begin(), rest.end());
      alternatives.push_back(std::move(sequence));
    }
    if (alternatives.empty()) return std::nullopt;
    return grammar_->OneOf(std::move(alternatives));
  }

  static std::optional<Rest> RestAfter(const std::optional<Rest>& rest, bool equal) {
    if (!rest.has_value() || !equal) return std::nullopt;
    return Rest{rest->digits.empty() ? "" : rest->digits.substr(1), rest->exclusive};
  }

  const int digits_;
  Grammar* const grammar_;
};

std::optional<Sequence> Magnitudes(const Limit& low, const Limit& high, Grammar* grammar) {
  if (low.integer > high.integer) return std::nullopt;
  const Fractions fractions(std::max(0, kMaxDigits - DigitsOf(high.integer)), grammar);
  std::vector<Sequence> alternatives;
  const auto add = [&](int64_t first, int64_t last, const std::optional<Rest>& from,
                       const std::optional<Rest>& to) {
    if (first > last) return;
    const std::optional<Sequence> suffix = fractions.Suffix(from, to);
    if (!suffix.has_value()) return;
    Sequence sequence = IntegersBetween(first, last, grammar);
    sequence.insert(sequence.end(), suffix->begin(), suffix->end());
    alternatives.push_back(std::move(sequence));
  };
  const Rest from = {low.fraction, low.exclusive};
  const Rest to = {high.fraction, high.exclusive};
  if (low.integer == high.integer) {
    add(low.integer, low.integer, from, to);
  } else {
    add(low.integer, low.integer, from, std::nullopt);
    add(low.integer + 1, high.integer - 1, std::nullopt, std::nullopt);
    add(high.integer, high.integer, std::nullopt, to);
  }
  if (alternatives.empty()) return std::nullopt;
  return grammar->OneOf(std::move(alternatives));
}

// Of what is at least `low`: where no number has more digits than are kept.
Limit Unbounded(const Limit& low) {
  const int digits = std::min(kMaxDigits, std::max(kUnboundedDigits, DigitsOf(low.integer) + 1));
  return {PowerOfTen(digits), "", true};
}

}  // namespace

std::optional<Sequence> DecimalsBetween(const std::optional<DecimalBound>& low,
                                        const std::optional<DecimalBound>& high, Grammar* grammar) {
  const auto largest = static_cast<double>(PowerOfTen(kMaxDigits));
  if (low.has_value() && low->value >= largest) return std::nullopt;
  if (high.has_value() && high->value <= -largest) return std::nullopt;
  // A limit of magnitudes; beyond the digits that are kept it is none.
  const auto limit = [&](const std::optional<DecimalBound>& bound,
                         double sign) -> std::optional<Limit> {
    if (!bound.has_value() || std::fabs(bound->value) >= largest) return std::nullopt;
    return LimitOf(bound->value * sign, bound->exclusive);
  };
  const Limit zero;
  const Limit above_zero = {0, "", true};
  std::vector<Sequence> alternatives;
  if (!high.has_value() || high->value >= 0) {
    const bool from_low = low.has_value() && low->value >= 0;
    const Limit first = from_low ? limit(low, 1).value_or(zero) : zero;
    auto positive = Magnitudes(first, limit(high, 1).value_or(Unbounded(first)), grammar);
    if (positive.has_value()) alternatives.push_back(*std::move(positive));
  }
  if (!low.has_value() || low->value < 0) {
    const bool from_high = high.has_value() && high->value < 0;
    const Limit first = from_high ? limit(high, -1).value_or(above_zero) : above_zero;
    const auto negative = Magnitudes(first, limit(low, -1).value_or(Unbounded(first)), grammar);
    if (negative.has_value()) {
      Sequence sequence = grammar->Bytes("-");
      sequence.insert(sequence.end(), negative->begin(), negative->end());
      alternatives.push_back(std::move(sequence));
    }
  }
  if (alternatives.empty()) return std::nullopt;
  return grammar->OneOf(std::move(alternatives));
}

}  // namespace mmfree
