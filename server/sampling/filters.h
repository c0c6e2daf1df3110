// What narrows a distribution before the draw: top-k, typical-p, top-p and min-p, in this order,
// each over what the one before it left. README.md has the exact definitions.
#ifndef MMFREE_SERVER_SAMPLING_FILTERS_H_
#define MMFREE_SERVER_SAMPLING_FILTERS_H_

#include <cstdint>
#include <vector>

#include "server/base/philox.h"

namespace mmfree {

// A token with a positive weight.
struct Candidate {
  int32_t id = 0;
  float logit = 0.0f;   // after bias and penalties
  uint64_t weight = 0;  // LogitWeight at the row's temperature
};

struct FilterOptions {
  uint32_t top_k = 0;      // 0: off
  float typical_p = 1.0f;  // in (0, 1]; 1: off
  float top_p = 1.0f;      // in [0, 1]; 1: off
  float min_p = 0.0f;      // in [0, 1]; 0: off

  bool any() const { return top_k > 0 || typical_p < 1.0f || top_p < 1.0f || min_p > 0.0f; }
};

// Binary places of a share.
inline constexpr int kShareBits = 40;
// Binary places of an information content.
inline constexpr float kInformationOne = 16777216.0f;  // 2^24

// trunc(share * 2^40), share in [0, 1].
uint64_t FixedShare(float share);
// ceil(fixed_share * total / 2^40).
MMFREE_HOST_DEVICE uint64_t ShareOf(uint64_t fixed_share, uint64_t total) {
  const uint64_t product = fixed_share * total;
  const uint64_t low = product + ((uint64_t{1} << kShareBits) - 1);
  const uint64_t high = MulHigh64(fixed_share, total) + (low < product ? 1 : 0);
  return (high << (64 - kShareBits)) | (low >> kShareBits);
}

// By how much the information of a logit exceeds the likeliest token's, in units of 2^-24 nat, of a
// logit that has a weight; never falls as the logit falls.
MMFREE_HOST_DEVICE uint32_t Information(float logit, float max_logit, float inverse_temperature) {
  return static_cast<uint32_t>((max_logit - logit) * inverse_temperature * kInformationOne);
}

// Removes the candidates that the filters drop; at least one stays. What stays is in no particular
// order. `candidates` is not empty; max_logit and inverse_temperature are those of the weights.
void ApplyFilters(const FilterOptions& options, float max_logit, float inverse_temperature,
                  std::vector<Candidate>* candidates);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_FILTERS_H_
