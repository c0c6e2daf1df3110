#include "server/sampling/integer_range.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

using Sequence = Grammar::Sequence;

Sequence Digits(char low, char high, Grammar* grammar) {
  return grammar->Character({{static_cast<uint32_t>(low), static_cast<uint32_t>(high)}});
}

Sequence Joined(Sequence a, const Sequence& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Digit strings from `low` to `high`, which have the same length.
Sequence SameLength(absl::string_view low, absl::string_view high, Grammar* grammar) {
  if (low.empty()) return {};
  const auto rest = static_cast<int64_t>(low.size()) - 1;
  const std::string zeros(low.size() - 1, '0');
  const std::string nines(low.size() - 1, '9');
  if (low.substr(1) == zeros && high.substr(1) == nines) {
    return Joined(Digits(low[0], high[0], grammar),
                  grammar->Repeat(Digits('0', '9', grammar), rest, rest));
  }
  const auto starting_with = [&](char digit, absl::string_view from, absl::string_view to) {
    return Joined(Digits(digit, digit, grammar), SameLength(from, to, grammar));
  };
  if (low[0] == high[0]) return starting_with(low[0], low.substr(1), high.substr(1));
  std::vector<Sequence> alternatives = {starting_with(low[0], low.substr(1), nines),
                                        starting_with(high[0], zeros, high.substr(1))};
  if (high[0] - low[0] > 1) {
    alternatives.push_back(
        Joined(Digits(static_cast<char>(low[0] + 1), static_cast<char>(high[0] - 1), grammar),
               grammar->Repeat(Digits('0', '9', grammar), rest, rest)));
  }
  return grammar->OneOf(std::move(alternatives));
}

// Of 0 and above.
Sequence Magnitudes(uint64_t low, uint64_t high, Grammar* grammar) {
  const std::string last = absl::StrCat(high);
  std::vector<Sequence> alternatives;
  for (std::string first = absl::StrCat(low); first.size() <= last.size();
       first = "1" + std::string(first.size(), '0')) {
    const std::string end = first.size() == last.size() ? last : std::string(first.size(), '9');
    alternatives.push_back(SameLength(first, end, grammar));
  }
  return grammar->OneOf(std::move(alternatives));
}

uint64_t Magnitude(int64_t value) {
  return value < 0 ? ~static_cast<uint64_t>(value) + 1 : static_cast<uint64_t>(value);
}

}  // namespace

Grammar::Sequence IntegersBetween(int64_t low, int64_t high, Grammar* grammar) {
  std::vector<Sequence> alternatives;
  if (high >= 0) {
    alternatives.push_back(
        Magnitudes(Magnitude(std::max<int64_t>(low, 0)), Magnitude(high), grammar));
  }
  if (low < 0) {
    const uint64_t least = Magnitude(std::min<int64_t>(high, -1));
    alternatives.push_back(Joined(grammar->Bytes("-"), Magnitudes(least, Magnitude(low), grammar)));
  }
  return grammar->OneOf(std::move(alternatives));
}

}  // namespace mmfree
