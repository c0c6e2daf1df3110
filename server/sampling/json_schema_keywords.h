// What the keywords of a JSON Schema say about a value's type, and which schemas exclude each
// other.
#ifndef MMFREE_SERVER_SAMPLING_JSON_SCHEMA_KEYWORDS_H_
#define MMFREE_SERVER_SAMPLING_JSON_SCHEMA_KEYWORDS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/sampling/exact_json.h"

namespace mmfree {

// Whether a keyword describes a value, or has done so before, and restricts none.
bool IsAnnotation(absl::string_view key);

// The type that a keyword is about; empty when it is about none in particular.
absl::string_view TypeOfKeyword(absl::string_view key);

// Whether `value` is of a type, by its name in schemas.
bool HasType(const ExactJson& value, absl::string_view type);

// The JSON pointer of a "$ref" within the document: what follows "#", its percent-encoding decoded.
// Nullopt when that is malformed, or gives no UTF-8.
std::optional<std::string> PointerOf(absl::string_view reference);

// The types that a schema allows: what it says, or else what its keywords are about, or else all.
// Nullopt when "type" is not a type or a list of types.
std::optional<std::vector<std::string>> TypesOf(const ExactJson& schema);

// The values of a "const" or an "enum" that are of its "type", where `schema`, a part of
// `document`, is or refers to one; nullopt when it does not.
std::optional<std::vector<ExactJson>> ConstantsOf(const ExactJson& document,
                                                  const ExactJson& schema);

// Whether no value that is written for one of `schemas`, parts of `document`, validates against
// another: they are of different types, or of different constants, or objects that need a property
// which is a constant, a different one in each.
bool ExcludeEachOther(const ExactJson& document, const ExactJson& schemas);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_JSON_SCHEMA_KEYWORDS_H_
