// The weights of a layer in their stored order, with their names in the reference implementation.
// The layout and the binding of views both walk these tables, so they cannot disagree.
#ifndef MMFREE_SERVER_MODEL_WEIGHT_TABLE_H_
#define MMFREE_SERVER_MODEL_WEIGHT_TABLE_H_

#include <cstdint>

#include "absl/types/span.h"
#include "server/model/config.h"
#include "server/model/model.h"

namespace mmfree {

struct LayerMatrixEntry {
  const char* name;  // after "model.layers.N."
  TernaryMatrix LayerWeights::*member;
  int64_t (*rows)(const ModelConfig&);
  int64_t (*cols)(const ModelConfig&);
};

struct LayerVectorEntry {
  const char* name;
  absl::Span<const float> LayerWeights::*member;
  int64_t (*size)(const ModelConfig&);
};

namespace weight_table_internal {
inline int64_t D(const ModelConfig& config) { return config.hidden_size; }
inline int64_t F(const ModelConfig& config) { return config.intermediate_size; }
inline int64_t TwoF(const ModelConfig& config) { return 2 * config.intermediate_size; }
}  // namespace weight_table_internal

inline constexpr LayerMatrixEntry kLayerMatrices[] = {
    {"attn.i_proj.weight", &LayerWeights::i, weight_table_internal::D, weight_table_internal::D},
    {"attn.f_proj.weight", &LayerWeights::f, weight_table_internal::D, weight_table_internal::D},
    {"attn.g_proj.weight", &LayerWeights::g, weight_table_internal::D, weight_table_internal::D},
    {"attn.o_proj.weight", &LayerWeights::o, weight_table_internal::D, weight_table_internal::D},
    {"mlp.gate_proj.weight", &LayerWeights::gate, weight_table_internal::TwoF,
     weight_table_internal::D},
    {"mlp.down_proj.weight", &LayerWeights::down, weight_table_internal::D,
     weight_table_internal::F},
};

inline constexpr LayerVectorEntry kLayerVectors[] = {
    {"attn_norm.weight", &LayerWeights::attn_norm, weight_table_internal::D},
    {"attn.i_proj.norm.weight", &LayerWeights::i_norm, weight_table_internal::D},
    {"attn.f_proj.norm.weight", &LayerWeights::f_norm, weight_table_internal::D},
    {"attn.g_proj.norm.weight", &LayerWeights::g_norm_in, weight_table_internal::D},
    {"attn.g_norm.weight", &LayerWeights::g_norm, weight_table_internal::D},
    {"attn.o_proj.norm.weight", &LayerWeights::o_norm, weight_table_internal::D},
    {"mlp_norm.weight", &LayerWeights::mlp_norm, weight_table_internal::D},
    {"mlp.gate_proj.norm.weight", &LayerWeights::gate_norm, weight_table_internal::D},
    {"mlp.down_proj.norm.weight", &LayerWeights::down_norm, weight_table_internal::F},
    // Not in a published checkpoint: computed from model.lower_bounds.
    {"attn.lower_bound", &LayerWeights::lower_bound, weight_table_internal::D},
};

inline constexpr const char* kLmHeadName = "lm_head.weight";
inline constexpr const char* kLmHeadNormName = "lm_head.norm.weight";
inline constexpr const char* kFinalNormName = "model.norm.weight";
inline constexpr const char* kEmbeddingName = "model.embeddings.weight";
inline constexpr const char* kLowerBoundsName = "model.lower_bounds";

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_WEIGHT_TABLE_H_
