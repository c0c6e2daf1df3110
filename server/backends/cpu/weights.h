// What a step reads of a model: views of its own memory, or of copies that lie where the threads
// are.
#ifndef MMFREE_SERVER_BACKENDS_CPU_WEIGHTS_H_
#define MMFREE_SERVER_BACKENDS_CPU_WEIGHTS_H_

#include <vector>

#include "absl/status/statusor.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/model/model.h"
#include "server/model/region.h"

namespace mmfree::cpu {

// Views into a model, which has to live as long, and into `copies`. Movable.
struct Weights {
  std::vector<LayerWeights> layers;
  TernaryMatrix lm_head;
  Region copies;
};

// The model's own memory.
Weights ViewWeights(const Model& model);

// Ternary matrices copied so that each thread of the pool writes, and thereby places on its own
// node, the pages of the rows that it multiplies (ThreadSlice of them; of gate's two halves each).
// Pages of a mapped model are given back as soon as they are copied. RESOURCE_EXHAUSTED when there
// is no memory for the copy.
absl::StatusOr<Weights> PlaceWeights(const Model& model, ThreadPool* pool);

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_WEIGHTS_H_
