#include "server/model/model.h"

namespace mmfree {

int64_t Model::ternary_bytes() const {
  int64_t bytes = lm_head_.bytes();
  for (const LayerWeights& layer : layers_) {
    bytes += layer.i.bytes() + layer.f.bytes() + layer.g.bytes() + layer.o.bytes() +
             layer.gate.bytes() + layer.down.bytes();
  }
  return bytes;
}

int64_t Model::parameters() const {
  const int64_t v = config_.vocab_size;
  const int64_t d = config_.hidden_size;
  const int64_t f = config_.intermediate_size;
  // Per layer: i, f, g, o; gate and down; eight norms of D, one of F, and the row of lower bounds.
  const int64_t layer = 4 * d * d + 3 * d * f + 9 * d + f;
  return config_.num_layers * layer + 2 * v * d + 2 * d;
}

}  // namespace mmfree
