#include "server/rpc/status.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace mmfree {
namespace {

constexpr char kTypePrefix[] = "type.googleapis.com/";
constexpr size_t kMaxFieldBytes = 96;
constexpr size_t kMaxDescriptionBytes = 256;
constexpr size_t kMaxViolationBytes = 2048;  // over all violations of one error
constexpr size_t kMaxQuotedBytes = 64;

// The longest prefix of at most `limit` bytes that does not cut a UTF-8 character.
absl::string_view Prefix(absl::string_view text, size_t limit) {
  if (text.size() <= limit) return text;
  size_t end = limit;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end);
}

template <typename Detail>
void SetDetail(const Detail& detail, absl::Status* status) {
  status->SetPayload(absl::StrCat(kTypePrefix, Detail::descriptor()->full_name()),
                     absl::Cord(detail.SerializeAsString()));
}

}  // namespace

absl::Status FieldError(absl::StatusCode code, const std::vector<FieldViolation>& violations) {
  google::rpc::BadRequest detail;
  std::string message;
  size_t bytes = 0;
  size_t listed = 0;
  for (const FieldViolation& violation : violations) {
    const absl::string_view field = Prefix(violation.field, kMaxFieldBytes);
    const absl::string_view description = Prefix(violation.description, kMaxDescriptionBytes);
    bytes += field.size() + description.size();
    if (listed == kMaxFieldViolations || bytes > kMaxViolationBytes) break;
    ++listed;
    google::rpc::BadRequest::FieldViolation* out = detail.add_field_violations();
    out->set_field(field.data(), field.size());
    out->set_description(description.data(), description.size());
    absl::StrAppend(&message, message.empty() ? "" : "; ", field, ": ", description);
  }
  if (listed < violations.size()) {
    message = absl::StrCat(Prefix(message, kMaxStatusMessageBytes - 32), "; and ",
                           violations.size() - listed, " more");
  }
  absl::Status status(code, message);
  SetDetail(detail, &status);
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view description) {
  return FieldError(absl::StatusCode::kInvalidArgument,
                    {{std::string(field), std::string(description)}});
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  if (status.ok()) return status;
  // Zero would ask for a tight loop; infinity means "unknown".
  delay = std::clamp(delay, absl::Milliseconds(10), absl::Minutes(10));
  google::rpc::RetryInfo detail;
  const int64_t seconds = absl::ToInt64Seconds(delay);
  detail.mutable_retry_delay()->set_seconds(seconds);
  detail.mutable_retry_delay()->set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(delay - absl::Seconds(seconds))));
  SetDetail(detail, &status);
  return status;
}

std::string Quoted(absl::string_view text) {
  const absl::string_view shown = Prefix(text, kMaxQuotedBytes);
  return absl::StrCat("\"", absl::Utf8SafeCEscape(shown),
                      shown.size() < text.size() ? "...\"" : "\"");
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const absl::string_view message = Prefix(status.message(), kMaxStatusMessageBytes);
  google::rpc::Status details;
  status.ForEachPayload([&](absl::string_view type, const absl::Cord& payload) {
    google::protobuf::Any* any = details.add_details();
    any->set_type_url(type.data(), type.size());
    any->set_value(std::string(payload));
  });
  std::string serialized;
  if (details.details_size() > 0) {
    details.set_code(static_cast<int>(status.code()));
    details.set_message(message.data(), message.size());
    serialized = details.SerializeAsString();
  }
  // absl's and gRPC's codes are the same numbers.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(message),
                      serialized);
}

std::string StatusCodeName(absl::StatusCode code) { return absl::StatusCodeToString(code); }

}  // namespace mmfree
