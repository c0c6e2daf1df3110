#include "server/sampling/multiples_range.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

using Sequence = Grammar::Sequence;

// Digits, read from the left, with what is left of the number so far when it is divided.
class Multiples {
 public:
  Multiples(int32_t divisor, Grammar* grammar) : divisor_(divisor), grammar_(grammar) {}

  // Of 0 and above.
  std::optional<Sequence> Between(int64_t low, int64_t high) {
    const std::string last = absl::StrCat(high);
    std::vector<Sequence> alternatives;
    for (std::string first = absl::StrCat(low); first.size() <= last.size();
         first = "1" + std::string(first.size(), '0')) {
      const std::string end = first.size() == last.size() ? last : std::string(first.size(), '9');
      std::optional<Sequence> digits = SameLength(first, end, 0);
      if (digits.has_value()) alternatives.push_back(*std::move(digits));
    }
    if (alternatives.empty()) return std::nullopt;
    return grammar_->OneOf(std::move(alternatives));
  }

 private:
  // Digit strings from `low` to `high`, which have the same length, after digits that left `rest`.
  std::optional<Sequence> SameLength(const std::string& low, const std::string& high,
                                     int32_t rest) {
    if (low.empty()) return rest == 0 ? std::optional<Sequence>(Sequence()) : std::nullopt;
    const bool any = low == std::string(low.size(), '0') && high == std::string(low.size(), '9');
    const std::pair<size_t, int32_t> key = {low.size(), rest};
    if (any) {
      if (const auto found = any_digits_.find(key); found != any_digits_.end()) {
        return found->second;
      }
    }
    std::vector<Sequence> alternatives;
    for (char digit = low[0]; digit <= high[0]; ++digit) {
      const std::string zeros(low.size() - 1, '0');
      const std::string nines(low.size() - 1, '9');
      const auto more = SameLength(digit == low[0] ? low.substr(1) : zeros,
                                   digit == high[0] ? high.substr(1) : nines,
                                   (rest * 10 + (digit - '0')) % divisor_);
      if (!more.has_value()) continue;
      Sequence sequence = grammar_->Bytes(std::string(1, digit));
      sequence.insert(sequence.end(), more->begin(), more->end());
      alternatives.push_back(std::move(sequence));
    }
    std::optional<Sequence> result;
    if (!alternatives.empty()) {
      // One symbol: what it is part of must not grow with it.
      const Grammar::Rule rule = grammar_->AddRule();
      for (Sequence& sequence : alternatives) grammar_->AddAlternative(rule, std::move(sequence));
      result = Sequence{rule};
    }
    if (any) any_digits_[key] = result;
    return result;
  }

  const int32_t divisor_;
  Grammar* const grammar_;
  // By how many digits are to come and the rest before them.
  absl::flat_hash_map<std::pair<size_t, int32_t>, std::optional<Sequence>> any_digits_;
};

}  // namespace

std::optional<Sequence> MultiplesBetween(int64_t low, int64_t high, int32_t divisor,
                                         Grammar* grammar) {
  Multiples multiples(divisor, grammar);
  std::vector<Sequence> alternatives;
  if (high >= 0) {
    auto positive = multiples.Between(std::max<int64_t>(low, 0), high);
    if (positive.has_value()) alternatives.push_back(*std::move(positive));
  }
  if (low < 0) {
    const auto negative = multiples.Between(-std::min<int64_t>(high, -1), -low);
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
