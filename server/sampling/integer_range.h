// Decimal integers within bounds, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_INTEGER_RANGE_H_
#define MMFREE_SERVER_SAMPLING_INTEGER_RANGE_H_

#include <cstdint>

#include "server/sampling/grammar.h"

namespace mmfree {

// The integers of [low, high] as JSON writes them: no leading zeros, no "-0". low <= high.
Grammar::Sequence IntegersBetween(int64_t low, int64_t high, Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_INTEGER_RANGE_H_
