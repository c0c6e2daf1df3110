// EXPECT_THAT(expression, StatusIs(code, HasSubstr("..."))) for absl::Status and absl::StatusOr.
#ifndef MMFREE_TESTS_SUPPORT_STATUS_IS_H_
#define MMFREE_TESTS_SUPPORT_STATUS_IS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"

namespace mmfree {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& status) {
  return status.status();
}

MATCHER_P2(StatusIs, code, message,
           "has code " + absl::StatusCodeToString(code) + " and a message that " +
               testing::DescribeMatcher<std::string>(message, negation)) {
  const absl::Status& status = StatusOf(arg);
  *result_listener << "which is " << status;
  return status.code() == code &&
         testing::ExplainMatchResult(message, std::string(status.message()), result_listener);
}

MATCHER(IsOk, negation ? "is an error" : "is OK") {
  *result_listener << "which is " << StatusOf(arg);
  return StatusOf(arg).ok();
}

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_STATUS_IS_H_
