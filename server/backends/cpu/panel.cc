#include "server/backends/cpu/panel.h"

#include <algorithm>

namespace mmfree::cpu {
namespace {

int32_t Capacity(const TileShape& shape) { return shape.per_vector * shape.vectors; }

}  // namespace

void PanelLayout::Set(const Kernels& kernels, int32_t tokens, int64_t padded_cols) {
  vector_bytes_ = kernels.vector_bytes;
  full_tile_tokens_ = Capacity(kernels.shapes[kernels.num_shapes - 1]);
  bytes_ = 0;
  tiles_.clear();
  for (int32_t first = 0; first < tokens;) {
    int32_t shape = 0;
    while (shape + 1 < kernels.num_shapes && Capacity(kernels.shapes[shape]) < tokens - first) {
      ++shape;
    }
    Tile tile;
    tile.offset = bytes_;
    tile.first = first;
    tile.shape = kernels.shapes[shape];
    tile.count = std::min(tokens - first, Capacity(tile.shape));
    tiles_.push_back(tile);
    bytes_ += Capacity(tile.shape) * padded_cols;
    first += tile.count;
  }
}

CodePlace PanelLayout::Place(int8_t* panel, int32_t token) const {
  const Tile& tile = tiles_[token / full_tile_tokens_];
  const int32_t in_tile = token - tile.first;
  const int32_t per_vector = tile.shape.per_vector;
  CodePlace place;
  place.chunk = vector_bytes_ / per_vector;
  place.stride = static_cast<int64_t>(tile.shape.vectors) * vector_bytes_;
  place.codes = panel + tile.offset + in_tile / per_vector * vector_bytes_ +
                in_tile % per_vector * place.chunk;
  return place;
}

int64_t PanelLayout::MaxBytes(const Kernels& kernels, int32_t tokens, int64_t padded_cols) {
  const int64_t tile = Capacity(kernels.shapes[kernels.num_shapes - 1]);
  return (tokens + tile - 1) / tile * tile * padded_cols;
}

}  // namespace mmfree::cpu
