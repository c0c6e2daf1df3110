// The numbers that a JSON Schema allows, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_JSON_SCHEMA_NUMBERS_H_
#define MMFREE_SERVER_SAMPLING_JSON_SCHEMA_NUMBERS_H_

#include <optional>

#include "absl/status/statusor.h"
#include "server/sampling/exact_json.h"
#include "server/sampling/grammar.h"

namespace mmfree {

// Numbers for a schema's bounds and "multipleOf"; `integers`: those without a fraction alone. At
// most 15 digits, which every reader keeps; where no number within the bounds has so few, integers
// of up to 18, and a bound itself as it is written. Nullopt: no number validates. INVALID_ARGUMENT,
// UNIMPLEMENTED: a keyword is malformed or would not be enforced.
absl::StatusOr<std::optional<Grammar::Sequence>> NumbersOfSchema(const ExactJson& schema,
                                                                 bool integers, Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_JSON_SCHEMA_NUMBERS_H_
