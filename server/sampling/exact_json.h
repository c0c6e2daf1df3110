// JSON whose numbers stay as they were written.
#ifndef MMFREE_SERVER_SAMPLING_EXACT_JSON_H_
#define MMFREE_SERVER_SAMPLING_EXACT_JSON_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// Integers that 64 bits hold are numbers of the library. Any other number has the binary type,
// which no text gives otherwise, and holds its text: ask the functions below, not the library,
// about numbers.
using ExactJson = nlohmann::ordered_json;

// INVALID_ARGUMENT: not JSON, or a number is beyond the range of binary64.
absl::StatusOr<ExactJson> ParseExactJson(absl::string_view text);

bool IsNumber(const ExactJson& value);
// Whether it is a number without a fraction, as 2, 2.0 and 2e1 are.
bool IsWhole(const ExactJson& value);

// Of a number: the nearest binary64.
double NearestDouble(const ExactJson& number);
// Of a number: the largest integer that is not above it, within [-limit, limit]. What is written as
// an integer counts exactly, anything else as its nearest binary64.
int64_t FloorWithin(const ExactJson& number, int64_t limit);
// The same, the smallest that is not below it.
int64_t CeilWithin(const ExactJson& number, int64_t limit);

// A value's type by its name in schemas; "number" for all numbers.
absl::string_view TypeName(const ExactJson& value);

// Whether two values are equal, as schemas compare them: 1 and 1.0 are, and members have no order.
// Numbers count as for FloorWithin.
bool SameValue(const ExactJson& a, const ExactJson& b);

// The value's text, without spaces: numbers as they came.
std::string Written(const ExactJson& value);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_EXACT_JSON_H_
