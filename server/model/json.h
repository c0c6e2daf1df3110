// JSON from outside: parsed without exceptions, with its size and depth bounded.
#ifndef MMFREE_SERVER_MODEL_JSON_H_
#define MMFREE_SERVER_MODEL_JSON_H_

#include <cstddef>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace mmfree {

struct JsonLimits {
  size_t max_bytes = size_t{1} << 20;
  int max_depth = 16;
};

// The document's root, an object. INVALID_ARGUMENT, starting with `source`, for text that is not
// JSON, is larger or deeper than `limits`, names a key twice in one object, or is not an object.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text, absl::string_view source,
                                               const JsonLimits& limits);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_JSON_H_
