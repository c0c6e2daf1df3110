// Why a draw had nothing to choose from.
#ifndef MMFREE_SERVER_SAMPLING_DEAD_END_H_
#define MMFREE_SERVER_SAMPLING_DEAD_END_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace mmfree {

// What excludes tokens.
enum class Exclusion : uint8_t {
  kConstraint,  // no sentence goes on with them
  kBounds,      // the constraint's own bounds: what can follow is not known
  kAllowedIds,  // not among the allowed ones
  kBannedIds,   // among the banned ones
  kStopTokens,  // they end the output, which is no sentence yet
};

// The exclusions that go with an error, as a payload of it; the first is the constraint's. Replaces
// earlier ones.
void SetExclusions(const std::vector<Exclusion>& exclusions, absl::Status* status);

// Takes them off again; none when there were none.
std::vector<Exclusion> TakeExclusions(absl::Status* status);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_DEAD_END_H_
