// The distribution of server/sampling/README.md, computed in float64 in the plainest way.
#ifndef MMFREE_TESTS_UNIT_SAMPLING_REFERENCE_SAMPLER_H_
#define MMFREE_TESTS_UNIT_SAMPLING_REFERENCE_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "server/sampling/request_sampler.h"

namespace mmfree {

// Probability of each id at a temperature > 0. `context` are the tokens before the output, `output`
// those emitted so far. `margin`, when not null, becomes the least relative distance of any
// decision of a filter to the opposite one: where it is tiny, rounding may decide otherwise.
std::vector<double> ReferenceDistribution(const std::vector<float>& logits,
                                          const RequestSampler::Options& options,
                                          double temperature, const std::vector<int32_t>& context,
                                          const std::vector<int32_t>& output, double* margin);

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_SAMPLING_REFERENCE_SAMPLER_H_
