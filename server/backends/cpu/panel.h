// How the tokens of a step lie in a panel of activations.
#ifndef MMFREE_SERVER_BACKENDS_CPU_PANEL_H_
#define MMFREE_SERVER_BACKENDS_CPU_PANEL_H_

#include <cstdint>
#include <vector>

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu {

// The tiles of `tokens` tokens of `padded_cols` columns: as many of the largest shape as fill up,
// then the smallest shape that holds the rest.
class PanelLayout {
 public:
  // Keeps its buffer when called again.
  void Set(const Kernels& kernels, int32_t tokens, int64_t padded_cols);

  const std::vector<Tile>& tiles() const { return tiles_; }
  int64_t bytes() const { return bytes_; }
  // Where the codes of `token` go in the panel at `panel`.
  CodePlace Place(int8_t* panel, int32_t token) const;

  // An upper bound of bytes() for up to `tokens` tokens.
  static int64_t MaxBytes(const Kernels& kernels, int32_t tokens, int64_t padded_cols);

 private:
  int32_t vector_bytes_ = 0;
  int32_t full_tile_tokens_ = 0;
  int64_t bytes_ = 0;
  std::vector<Tile> tiles_;
};

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_PANEL_H_
