// JSON Schema (2020-12, a documented subset), for constrained decoding.
#ifndef MMFREE_SERVER_SAMPLING_JSON_SCHEMA_H_
#define MMFREE_SERVER_SAMPLING_JSON_SCHEMA_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/sampling/grammar.h"

namespace mmfree {

// JSON texts that validate against `schema`: not all of them, but in one form of writing, and with
// the properties that it names, in its order. README.md lists the keywords. INVALID_ARGUMENT: not a
// schema, or nothing validates. UNIMPLEMENTED: a keyword that would not be enforced. Both name the
// place as a JSON pointer.
absl::StatusOr<Grammar> GrammarOfJsonSchema(absl::string_view schema);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_JSON_SCHEMA_H_
