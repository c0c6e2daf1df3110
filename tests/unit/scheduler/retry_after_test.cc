#include "server/scheduler/retry_after.h"

#include <gtest/gtest.h>

namespace mmfree {
namespace {

TEST(RetryAfterTest, GoesWithTheStatusUntilItIsTaken) {
  absl::Status status = absl::ResourceExhaustedError("full");
  EXPECT_EQ(TakeRetryAfter(&status), std::nullopt);
  SetRetryAfter(absl::Milliseconds(1), &status);
  SetRetryAfter(absl::Hours(1000), &status);
  EXPECT_EQ(TakeRetryAfter(&status), absl::Hours(1000));
  EXPECT_EQ(status, absl::ResourceExhaustedError("full"));
}

}  // namespace
}  // namespace mmfree
