#include "server/scheduler/retry_after.h"

#include <cstdint>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

constexpr char kKey[] = "mmfree/retry-after-ns";

}  // namespace

void SetRetryAfter(absl::Duration delay, absl::Status* status) {
  status->SetPayload(kKey, absl::Cord(absl::StrCat(absl::ToInt64Nanoseconds(delay))));
}

std::optional<absl::Duration> TakeRetryAfter(absl::Status* status) {
  const auto payload = status->GetPayload(kKey);
  int64_t nanoseconds = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &nanoseconds)) {
    return std::nullopt;
  }
  status->ErasePayload(kKey);
  return absl::Nanoseconds(nanoseconds);
}

}  // namespace mmfree
