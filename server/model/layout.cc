#include "server/model/layout.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/model/weight_table.h"

namespace mmfree {
namespace {

constexpr int64_t kVectorPad = kTensorAlign / static_cast<int64_t>(sizeof(float));

int64_t PaddedVector(int64_t size) { return (size + kVectorPad - 1) / kVectorPad * kVectorPad; }

std::string LayerName(int64_t layer, const char* name) {
  return absl::StrCat("model.layers.", layer, ".", name);
}

class Builder {
 public:
  void Matrix(std::string name, int64_t rows, int64_t cols) {
    PackedTensor tensor;
    tensor.kind = PackedTensor::Kind::kTernary;
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.shape = {TernaryMatrix::RowGroups(rows), TernaryMatrix::PaddedCols(cols)};
    Append(std::move(name), std::move(tensor), 1);
  }
  void Vector(std::string name, int64_t size, int64_t lower_bound_layer = -1) {
    PackedTensor tensor;
    tensor.kind = PackedTensor::Kind::kVector;
    tensor.cols = size;
    tensor.lower_bound_layer = lower_bound_layer;
    tensor.shape = {PaddedVector(size)};
    Append(std::move(name), std::move(tensor), sizeof(float));
  }
  void EmbeddingTable(std::string name, int64_t rows, int64_t cols, DType dtype) {
    PackedTensor tensor;
    tensor.kind = PackedTensor::Kind::kEmbedding;
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.shape = {rows, cols};
    Append(std::move(name), std::move(tensor), DTypeBytes(dtype));
  }
  PackedLayout Take() && { return std::move(layout_); }

 private:
  void Append(std::string name, PackedTensor tensor, int64_t element_bytes) {
    tensor.name = std::move(name);
    tensor.bytes = element_bytes;
    for (const int64_t extent : tensor.shape) tensor.bytes *= extent;
    tensor.offset = layout_.bytes;
    layout_.bytes += tensor.bytes;
    layout_.tensors.push_back(std::move(tensor));
  }

  PackedLayout layout_;
};

}  // namespace

int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
  }
  return "?";
}

PackedLayout MakePackedLayout(const ModelConfig& config, DType embedding_dtype) {
  Builder builder;
  for (int64_t n = 0; n < config.num_layers; ++n) {
    for (const LayerMatrixEntry& entry : kLayerMatrices) {
      builder.Matrix(LayerName(n, entry.name), entry.rows(config), entry.cols(config));
    }
    for (const LayerVectorEntry& entry : kLayerVectors) {
      const bool lower_bound = entry.member == &LayerWeights::lower_bound;
      builder.Vector(LayerName(n, entry.name), entry.size(config), lower_bound ? n : -1);
    }
  }
  builder.Matrix(kLmHeadName, config.vocab_size, config.hidden_size);
  builder.Vector(kFinalNormName, config.hidden_size);
  builder.Vector(kLmHeadNormName, config.hidden_size);
  // The only tensor whose size need not be a multiple of the alignment: nothing may follow it.
  builder.EmbeddingTable(kEmbeddingName, config.vocab_size, config.hidden_size, embedding_dtype);
  return std::move(builder).Take();
}

}  // namespace mmfree
