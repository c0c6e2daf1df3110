// Decimal numbers within bounds, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_DECIMAL_RANGE_H_
#define MMFREE_SERVER_SAMPLING_DECIMAL_RANGE_H_

#include <optional>

#include "server/sampling/grammar.h"

namespace mmfree {

struct DecimalBound {
  double value = 0.0;  // finite
  bool exclusive = false;
};

// Numbers between the bounds as JSON writes them, with a fraction or without, but no exponent and
// no "-0". Of at most 15 digits, so that what reads them as binary64 finds them on the same side of
// each bound; where a bound is absent, up to nine digits before the point, or one more than the
// other bound has. Nullopt when there is no such number.
std::optional<Grammar::Sequence> DecimalsBetween(const std::optional<DecimalBound>& low,
                                                 const std::optional<DecimalBound>& high,
                                                 Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_DECIMAL_RANGE_H_
