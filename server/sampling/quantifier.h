// How often the item before it may stand: what regular expressions and GBNF write alike.
#ifndef MMFREE_SERVER_SAMPLING_QUANTIFIER_H_
#define MMFREE_SERVER_SAMPLING_QUANTIFIER_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "server/sampling/text_reader.h"

namespace mmfree {

struct Quantifier {
  static constexpr int64_t kUnbounded = -1;
  static constexpr int64_t kMaxCount = 10'000;

  int64_t min = 1;
  int64_t max = 1;  // or kUnbounded
};

// Reads * + ? {n} {n,} or {n,m}; nullopt, with nothing read, when none stands there.
// INVALID_ARGUMENT for a count that is malformed, out of order or above kMaxCount. {,m} is
// malformed: to some it is {0,m}, to others plain text.
absl::StatusOr<std::optional<Quantifier>> TakeQuantifier(TextReader* reader);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_QUANTIFIER_H_
