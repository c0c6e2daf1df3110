// What narrows a distribution before the draw: top-k, typical-p, top-p and min-p, in this order,
// each over what the one before it left. README.md has the exact definitions.
#ifndef MMFREE_SERVER_SAMPLING_FILTERS_H_
#define MMFREE_SERVER_SAMPLING_FILTERS_H_

#include <cstdint>
#include <vector>

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

// ceil(share * total), with share in [0, 1] taken in units of 2^-40.
uint64_t ShareOf(float share, uint64_t total);

// Removes the candidates that the filters drop; at least one stays. What stays is in no particular
// order. `candidates` is not empty; max_logit and inverse_temperature are those of the weights.
void ApplyFilters(const FilterOptions& options, float max_logit, float inverse_temperature,
                  std::vector<Candidate>* candidates);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_FILTERS_H_
