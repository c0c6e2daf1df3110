// The tensors of a packed model: names, shapes, order and offsets (server/model/FORMAT.md).
//
// The same layout serves the packed file, the buffer that a published checkpoint is quantised into,
// and random models; only where the bytes come from differs.
#ifndef MMFREE_SERVER_MODEL_LAYOUT_H_
#define MMFREE_SERVER_MODEL_LAYOUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "server/model/config.h"
#include "server/model/model.h"

namespace mmfree {

// Every tensor starts at a multiple of this, in the file and in memory.
inline constexpr int64_t kTensorAlign = 64;

struct PackedTensor {
  enum class Kind : uint8_t {
    kTernary,    // U8 [RowGroups(rows), PaddedCols(cols)]
    kVector,     // F32 [cols padded to 16], zeros beyond cols
    kEmbedding,  // [rows, cols] in the published dtype
  };
  Kind kind = Kind::kVector;
  std::string name;
  int64_t rows = 1;
  int64_t cols = 0;
  // n when this is the vector lb_n, which a published checkpoint does not have; else -1.
  int64_t lower_bound_layer = -1;
  std::vector<int64_t> shape;  // as stored
  int64_t offset = 0;          // from the first data byte
  int64_t bytes = 0;
};

struct PackedLayout {
  std::vector<PackedTensor> tensors;  // contiguous, by offset; the embedding is last
  int64_t bytes = 0;
};

int64_t DTypeBytes(DType dtype);
// "F32", "F16" or "BF16".
const char* DTypeName(DType dtype);

// `config` must be valid.
PackedLayout MakePackedLayout(const ModelConfig& config, DType embedding_dtype);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_LAYOUT_H_
