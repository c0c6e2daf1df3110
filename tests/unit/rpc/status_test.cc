#include "server/rpc/status.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;

google::rpc::Status DetailsOf(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  return details;
}

TEST(ToGrpcStatus, KeepsEveryCode) {
  for (int code = 1; code <= 16; ++code) {
    const grpc::Status status =
        ToGrpcStatus(absl::Status(static_cast<absl::StatusCode>(code), "why"));
    EXPECT_EQ(status.error_code(), code);
    EXPECT_EQ(status.error_message(), "why");
    EXPECT_EQ(status.error_details(), "");
  }
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
}

TEST(ToGrpcStatus, FieldViolationsTravelInTheDetails) {
  const grpc::Status status = ToGrpcStatus(InvalidField("sampling.top_p", "must be less"));
  EXPECT_EQ(status.error_message(), "sampling.top_p: must be less");
  const google::rpc::Status details = DetailsOf(status);
  EXPECT_EQ(details.code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(details.message(), status.error_message());
  ASSERT_THAT(details.details(), SizeIs(1));
  google::rpc::BadRequest bad_request;
  ASSERT_TRUE(details.details(0).UnpackTo(&bad_request));
  ASSERT_THAT(bad_request.field_violations(), SizeIs(1));
  EXPECT_EQ(bad_request.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(bad_request.field_violations(0).description(), "must be less");
}

TEST(ToGrpcStatus, RetryDelayTravelsAndIsNeverZeroNorEndless) {
  const auto delay = [](absl::Duration given) {
    google::rpc::RetryInfo retry;
    EXPECT_TRUE(DetailsOf(ToGrpcStatus(WithRetryDelay(absl::UnavailableError("x"), given)))
                    .details(0)
                    .UnpackTo(&retry));
    return absl::Seconds(retry.retry_delay().seconds()) +
           absl::Nanoseconds(retry.retry_delay().nanos());
  };
  EXPECT_EQ(delay(absl::Milliseconds(1500)), absl::Milliseconds(1500));
  EXPECT_EQ(delay(absl::ZeroDuration()), absl::Milliseconds(10));
  EXPECT_EQ(delay(absl::InfiniteDuration()), absl::Minutes(10));
  EXPECT_TRUE(WithRetryDelay(absl::OkStatus(), absl::Seconds(1)).ok());
}

TEST(ToGrpcStatus, MessageIsCutBetweenCharacters) {
  std::string message;
  while (message.size() < 3 * kMaxStatusMessageBytes) message += "\u3042";  // three bytes each
  const grpc::Status status = ToGrpcStatus(absl::InternalError(message));
  EXPECT_EQ(status.error_message().size(), kMaxStatusMessageBytes / 3 * 3);
  EXPECT_EQ(message.compare(0, status.error_message().size(), status.error_message()), 0);
}

// Clients refuse more than 8 KiB of trailers.
TEST(FieldError, AnyNumberOfViolationsFitsIntoTheTrailers) {
  std::vector<FieldViolation> violations;
  for (int i = 0; i < 1000; ++i) {
    violations.push_back({std::string(500, 'f'), std::string(5000, 'd')});
  }
  const grpc::Status status =
      ToGrpcStatus(FieldError(absl::StatusCode::kInvalidArgument, violations));
  EXPECT_THAT(status.error_message(), AllOf(HasSubstr("ffff: dddd"), HasSubstr(" more")));
  EXPECT_LE(status.error_message().size() + status.error_details().size() * 4 / 3, 7000u);
  for (FieldViolation& violation : violations) violation = {"f", "d"};
  google::rpc::BadRequest bad_request;
  ASSERT_TRUE(DetailsOf(ToGrpcStatus(FieldError(absl::StatusCode::kInvalidArgument, violations)))
                  .details(0)
                  .UnpackTo(&bad_request));
  EXPECT_THAT(bad_request.field_violations(), SizeIs(kMaxFieldViolations));
}

TEST(Quoted, EscapesAndCuts) {
  EXPECT_EQ(Quoted("a\"\n"), "\"a\\\"\\n\"");
  EXPECT_EQ(Quoted(std::string(1000, 'x')), "\"" + std::string(64, 'x') + "...\"");
}

}  // namespace
}  // namespace mmfree
