// Collects what is wrong with a request.
#ifndef MMFREE_SERVER_RPC_VIOLATIONS_H_
#define MMFREE_SERVER_RPC_VIOLATIONS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/rpc/status.h"

namespace mmfree {

class Violations {
 public:
  // A wrong value. `field` is its path in the request, `description` says what is accepted.
  void Add(absl::string_view field, absl::string_view description) {
    // One more than can be listed is enough to say that there are more.
    if (invalid_.size() <= kMaxFieldViolations) {
      invalid_.push_back({std::string(field), std::string(description)});
    }
  }

  void Check(bool ok, absl::string_view field, absl::string_view description) {
    if (!ok) Add(field, description);
  }

  // NaN is in no range.
  template <typename T>
  void CheckRange(absl::string_view field, T value, T low, T high) {
    if (!(value >= low && value <= high)) {
      Add(field, absl::StrCat("must be in [", low, ", ", high, "], is ", value));
    }
  }

  bool invalid() const { return !invalid_.empty(); }

  absl::Status ToStatus() const {
    if (invalid_.empty()) return absl::OkStatus();
    return FieldError(absl::StatusCode::kInvalidArgument, invalid_);
  }

 private:
  std::vector<FieldViolation> invalid_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_VIOLATIONS_H_
