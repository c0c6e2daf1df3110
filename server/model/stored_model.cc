#include "server/model/stored_model.h"

#include <utility>

#include "server/model/weight_table.h"

namespace mmfree {

StoredModel::StoredModel(Parts parts)
    : layout_(std::move(parts.layout)),
      region_(std::move(parts.region)),
      data_(std::move(parts.data)),
      scales_(std::move(parts.scales)),
      sha256_(std::move(parts.sha256)) {
  config_ = parts.config;
  digest_ = std::move(parts.digest);
  packed_ = parts.packed;

  size_t t = 0;
  const auto matrix = [&] {
    const PackedTensor& tensor = layout_.tensors[t];
    TernaryMatrix view;
    view.rows = tensor.rows;
    view.cols = tensor.cols;
    view.scale = scales_[t];
    view.codes = data_[t];
    ++t;
    return view;
  };
  const auto vector = [&] {
    const absl::Span<const float> view(reinterpret_cast<const float*>(data_[t]),
                                       static_cast<size_t>(layout_.tensors[t].cols));
    ++t;
    return view;
  };
  layers_.resize(config_.num_layers);
  for (LayerWeights& layer : layers_) {
    for (const LayerMatrixEntry& entry : kLayerMatrices) layer.*entry.member = matrix();
    for (const LayerVectorEntry& entry : kLayerVectors) layer.*entry.member = vector();
  }
  lm_head_ = matrix();
  final_norm_ = vector();
  lm_head_norm_ = vector();
  embedding_.dtype = parts.embedding_dtype;
  embedding_.data = data_[t];
}

}  // namespace mmfree
