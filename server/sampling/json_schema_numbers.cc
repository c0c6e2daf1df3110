#include "server/sampling/json_schema_numbers.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sampling/decimal_range.h"
#include "server/sampling/integer_range.h"
#include "server/sampling/multiples_range.h"

namespace mmfree {
namespace {

using Sequence = Grammar::Sequence;

constexpr int64_t kUsualLimit = 999'999'999'999'999;  // what binary64 keeps, and so all readers
constexpr int64_t kLargestLimit = 999'999'999'999'999'999;  // what the integers' grammars can have
constexpr int64_t kBeyond = kLargestLimit + 1;
// Readers that have binary64 alone divide no more than this exactly.
constexpr int64_t kLargestMultiple = (int64_t{1} << 53) - 1;

int64_t LargestLimit(int32_t divisor) { return divisor == 1 ? kLargestLimit : kLargestMultiple; }

// A bound's keyword: null when it is absent.
absl::StatusOr<const ExactJson*> NumberAt(const ExactJson& schema, const char* key) {
  const auto found = schema.find(key);
  if (found == schema.end()) return nullptr;
  if (!IsNumber(*found)) {
    return absl::InvalidArgumentError(absl::StrCat("\"", key, "\" is not a number"));
  }
  return &*found;
}

// The keywords of one side of a range.
struct Side {
  const ExactJson* inclusive;
  const ExactJson* exclusive;

  bool any() const { return inclusive != nullptr || exclusive != nullptr; }
};

struct Bounds {
  Side low;
  Side high;

  // The first and last integers within them. kBeyond in magnitude: or still further out.
  int64_t first() const {
    int64_t first = -kBeyond;
    if (low.inclusive != nullptr) first = CeilWithin(*low.inclusive, kBeyond);
    if (low.exclusive != nullptr) {
      const int64_t below = FloorWithin(*low.exclusive, kBeyond);
      if (below > -kBeyond) first = std::max(first, std::min(below + 1, kBeyond));
    }
    return first;
  }
  int64_t last() const {
    int64_t last = kBeyond;
    if (high.inclusive != nullptr) last = FloorWithin(*high.inclusive, kBeyond);
    if (high.exclusive != nullptr) {
      const int64_t above = CeilWithin(*high.exclusive, kBeyond);
      if (above < kBeyond) last = std::min(last, std::max(above - 1, -kBeyond));
    }
    return last;
  }
};

absl::StatusOr<Bounds> BoundsOf(const ExactJson& schema) {
  Bounds bounds;
  MMFREE_ASSIGN_OR_RETURN(bounds.low.inclusive, NumberAt(schema, "minimum"));
  MMFREE_ASSIGN_OR_RETURN(bounds.low.exclusive, NumberAt(schema, "exclusiveMinimum"));
  MMFREE_ASSIGN_OR_RETURN(bounds.high.inclusive, NumberAt(schema, "maximum"));
  MMFREE_ASSIGN_OR_RETURN(bounds.high.exclusive, NumberAt(schema, "exclusiveMaximum"));
  return bounds;
}

absl::StatusOr<int32_t> DivisorOf(const ExactJson& schema) {
  MMFREE_ASSIGN_OR_RETURN(const ExactJson* const divisor, NumberAt(schema, "multipleOf"));
  if (divisor == nullptr) return 1;
  if (NearestDouble(*divisor) <= 0) {
    return absl::InvalidArgumentError("\"multipleOf\" is not above 0");
  }
  if (!IsWhole(*divisor) || NearestDouble(*divisor) > kMaxDivisor) {
    return absl::UnimplementedError(absl::StrCat("\"multipleOf\" that is not whole or above ",
                                                 kMaxDivisor, " is not supported"));
  }
  return static_cast<int32_t>(FloorWithin(*divisor, kMaxDivisor));
}

std::optional<Sequence> IntegersWithin(int64_t first, int64_t last, int32_t divisor,
                                       Grammar* grammar) {
  for (const int64_t limit : {kUsualLimit, LargestLimit(divisor)}) {
    const int64_t from = std::max(first, -limit);
    const int64_t to = std::min(last, limit);
    if (from > to) continue;
    if (divisor == 1) return IntegersBetween(from, to, grammar);
    if (auto multiples = MultiplesBetween(from, to, divisor, grammar); multiples.has_value()) {
      return multiples;
    }
  }
  return std::nullopt;
}

absl::StatusOr<std::optional<Sequence>> Integers(const Bounds& bounds, int32_t divisor,
                                                 Grammar* grammar) {
  const int64_t first = bounds.first();
  const int64_t last = bounds.last();
  std::optional<Sequence> integers = IntegersWithin(first, last, divisor, grammar);
  const int64_t limit = LargestLimit(divisor);
  if (!integers.has_value() && first <= last && (first < -limit || last > limit)) {
    return absl::UnimplementedError(divisor == 1
                                        ? "an integer of more than 18 digits is not supported"
                                        : "a multiple beyond 2^53 is not supported");
  }
  return integers;
}

// The tighter one of a side's bounds; `sign` is -1 for upper ones.
std::optional<DecimalBound> Tighter(const Side& side, double sign) {
  if (!side.any()) return std::nullopt;
  if (side.inclusive == nullptr) return DecimalBound{NearestDouble(*side.exclusive), true};
  if (side.exclusive == nullptr) return DecimalBound{NearestDouble(*side.inclusive), false};
  const double inclusive = NearestDouble(*side.inclusive);
  const double exclusive = NearestDouble(*side.exclusive);
  if (exclusive * sign >= inclusive * sign) return DecimalBound{exclusive, true};
  return DecimalBound{inclusive, false};
}

bool AnyBetween(const std::optional<DecimalBound>& low, const std::optional<DecimalBound>& high) {
  if (!low.has_value() || !high.has_value() || low->value < high->value) return true;
  return low->value == high->value && !low->exclusive && !high->exclusive;
}

absl::StatusOr<std::optional<Sequence>> Decimals(const Bounds& bounds, Grammar* grammar) {
  const std::optional<DecimalBound> low = Tighter(bounds.low, 1);
  const std::optional<DecimalBound> high = Tighter(bounds.high, -1);
  if (std::optional<Sequence> number = DecimalsBetween(low, high, grammar); number.has_value()) {
    return number;
  }
  // Bounds so large or so near to each other that 15 digits do not do.
  if (std::optional<Sequence> integers = IntegersWithin(bounds.first(), bounds.last(), 1, grammar);
      integers.has_value()) {
    return integers;
  }
  if (!AnyBetween(low, high)) return std::nullopt;
  if (low.has_value() && !low->exclusive) return grammar->Bytes(Written(*bounds.low.inclusive));
  if (high.has_value() && !high->exclusive) return grammar->Bytes(Written(*bounds.high.inclusive));
  return absl::UnimplementedError(
      "a range in which every number has more than 15 digits is not supported");
}

// Of no bounds.
Sequence AnyNumber(Grammar* grammar) {
  const Sequence digit = grammar->Character({{'0', '9'}});
  Sequence fraction = grammar->Bytes(".");
  const Sequence digits = grammar->Repeat(digit, 1, 15);
  fraction.insert(fraction.end(), digits.begin(), digits.end());
  Sequence exponent = grammar->Character({{'e', 'e'}, {'E', 'E'}});
  for (const Sequence& part : {grammar->Optional(grammar->Character({{'+', '+'}, {'-', '-'}})),
                               grammar->Repeat(digit, 1, 2)}) {
    exponent.insert(exponent.end(), part.begin(), part.end());
  }
  Sequence number = IntegersBetween(-kUsualLimit, kUsualLimit, grammar);
  for (const Sequence& part : {grammar->Optional(fraction), grammar->Optional(exponent)}) {
    number.insert(number.end(), part.begin(), part.end());
  }
  return number;
}

}  // namespace

absl::StatusOr<std::optional<Sequence>> NumbersOfSchema(const ExactJson& schema, bool integers,
                                                        Grammar* grammar) {
  MMFREE_ASSIGN_OR_RETURN(const Bounds bounds, BoundsOf(schema));
  MMFREE_ASSIGN_OR_RETURN(const int32_t divisor, DivisorOf(schema));
  // Multiples are whole, too.
  if (integers || schema.contains("multipleOf")) return Integers(bounds, divisor, grammar);
  if (!bounds.low.any() && !bounds.high.any()) return AnyNumber(grammar);
  return Decimals(bounds, grammar);
}

}  // namespace mmfree
