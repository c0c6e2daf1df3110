// Multiples of a number within bounds, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_MULTIPLES_RANGE_H_
#define MMFREE_SERVER_SAMPLING_MULTIPLES_RANGE_H_

#include <cstdint>
#include <optional>

#include "server/sampling/grammar.h"

namespace mmfree {

// More would make the grammar large: it has a rule for each rest and each number of digits.
inline constexpr int32_t kMaxDivisor = 200;

// The multiples of `divisor`, in [1, kMaxDivisor], in [low, high], written as IntegersBetween does.
// low <= high, both below 10^18 in magnitude. Nullopt when there is none.
std::optional<Grammar::Sequence> MultiplesBetween(int64_t low, int64_t high, int32_t divisor,
                                                  Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_MULTIPLES_RANGE_H_
