#include "server/sampling/dead_end.h"

#include <string>

#include "absl/strings/cord.h"

namespace mmfree {
namespace {

constexpr char kKey[] = "mmfree/exclusions";

}  // namespace

void SetExclusions(const std::vector<Exclusion>& exclusions, absl::Status* status) {
  std::string bytes;
  for (const Exclusion exclusion : exclusions) bytes.push_back(static_cast<char>(exclusion));
  status->SetPayload(kKey, absl::Cord(bytes));
}

std::vector<Exclusion> TakeExclusions(absl::Status* status) {
  std::vector<Exclusion> exclusions;
  const auto payload = status->GetPayload(kKey);
  if (!payload.has_value()) return exclusions;
  for (const char byte : std::string(*payload)) exclusions.push_back(static_cast<Exclusion>(byte));
  status->ErasePayload(kKey);
  return exclusions;
}

}  // namespace mmfree
