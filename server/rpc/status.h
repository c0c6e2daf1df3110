// Errors of the RPC layer: absl::Status with typed details inside the server, grpc::Status on the
// wire. The only place where one becomes the other.
#ifndef MMFREE_SERVER_RPC_STATUS_H_
#define MMFREE_SERVER_RPC_STATUS_H_

#include <grpcpp/support/status.h>

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace mmfree {

// Bounds of what one error puts into the trailers, which clients limit to 8 KiB in all.
inline constexpr size_t kMaxStatusMessageBytes = 1024;
inline constexpr size_t kMaxFieldViolations = 16;

struct FieldViolation {
  std::string field;        // path inside the request, e.g. "sampling.temperature"
  std::string description;  // what was wrong and what is accepted
};

// An error with google.rpc.BadRequest details. The message names every field that fits.
// `violations` is not empty; code is INVALID_ARGUMENT or UNIMPLEMENTED.
absl::Status FieldError(absl::StatusCode code, const std::vector<FieldViolation>& violations);

// INVALID_ARGUMENT for one field.
absl::Status InvalidField(absl::string_view field, absl::string_view description);

// Adds google.rpc.RetryInfo details: try again after `delay`.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

// A string of the request as it may appear in a message: quoted, escaped and cut to 64 bytes.
std::string Quoted(absl::string_view text);

// Converts code, message (cut to kMaxStatusMessageBytes at a character boundary) and details.
grpc::Status ToGrpcStatus(const absl::Status& status);

// "OK", "INVALID_ARGUMENT", ...
std::string StatusCodeName(absl::StatusCode code);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_STATUS_H_
