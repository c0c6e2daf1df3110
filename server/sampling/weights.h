// The weights of a whole row of logits, for the sampling that happens on the host.
#ifndef MMFREE_SERVER_SAMPLING_WEIGHTS_H_
#define MMFREE_SERVER_SAMPLING_WEIGHTS_H_

#include <cstdint>

#include "absl/types/span.h"

namespace mmfree {

// weights[i] = LogitWeight(logits[i], max_logit, inverse_temperature). Returns their sum. As many
// weights as logits. The same values whatever the processor; several times as fast where it has
// fused multiply-add.
uint64_t LogitWeights(absl::Span<const float> logits, float max_logit, float inverse_temperature,
                      absl::Span<uint64_t> weights);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_WEIGHTS_H_
