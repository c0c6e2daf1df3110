// LoadPublished: a checkpoint in the reference's layout, quantised and packed into memory.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/numerics.h"
#include "server/base/status_macros.h"
#include "server/model/convert.h"
#include "server/model/layout.h"
#include "server/model/loader.h"
#include "server/model/packed.h"
#include "server/model/parallel.h"
#include "server/model/region.h"
#include "server/model/sha256.h"
#include "server/model/weight_table.h"

namespace mmfree {
namespace {

constexpr absl::string_view kNormSuffix = ".norm.weight";

std::string Where(const Checkpoint::Entry& entry) {
  return absl::StrCat(*entry.source, ": tensor ", QuotedName(entry.tensor->name));
}

absl::Status Missing(const Checkpoint& checkpoint, absl::string_view name) {
  return absl::InvalidArgumentError(
      absl::StrCat(checkpoint.source(), ": tensor ", QuotedName(name), " is missing"));
}

absl::StatusOr<Checkpoint::Entry> FindFloat(const Checkpoint& checkpoint, absl::string_view name,
                                            absl::Span<const int64_t> shape) {
  const Checkpoint::Entry* const entry = checkpoint.Find(name);
  if (entry == nullptr) return Missing(checkpoint, name);
  const TensorView& tensor = *entry->tensor;
  if (tensor.type == TensorType::kU8 || tensor.type == TensorType::kI32) {
    return absl::InvalidArgumentError(absl::StrCat(
        Where(*entry), ": dtype: expected F32, F16 or BF16, got ", TensorTypeName(tensor.type)));
  }
  if (absl::MakeConstSpan(tensor.shape) != shape) {
    return absl::InvalidArgumentError(absl::StrCat(
        Where(*entry), ": shape: expected ", ShapeName(shape), ", got ", ShapeName(tensor.shape)));
  }
  return *entry;
}

// The reference has a linear layer without a norm of its own; a checkpoint of that variant has none
// of these tensors, which is worth a clearer word than the first one missing.
absl::Status CheckHasNorms(const Checkpoint& checkpoint) {
  for (const auto& [name, entry] : checkpoint.entries()) {
    if (absl::EndsWith(name, absl::StrCat("_proj", kNormSuffix))) return absl::OkStatus();
  }
  if (checkpoint.Find("model.layers.0.attn.i_proj.weight") == nullptr) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      checkpoint.source(), ": no projection has a norm (\"model.layers.0.attn.i_proj", kNormSuffix,
      "\" and the others are missing): the variant without norms is not supported"));
}

DType EmbeddingDType(TensorType type) {
  if (type == TensorType::kF16) return DType::kF16;
  return type == TensorType::kBF16 ? DType::kBF16 : DType::kF32;
}

// lb_n = c_n - c_0 with c the cumulated softmax of each column over the layers. For each column, in
// binary32: m = max_n x_n; e_n = Exp(x_n - m); z = e_0 + ... + e_{L-1}; p_n = e_n / z;
// c_n = c_{n-1} + p_n; every sum in rising order of n. bounds: [L, D], replaced in place.
void CumulateLowerBounds(int64_t layers, int64_t hidden, float* bounds) {
  for (int64_t k = 0; k < hidden; ++k) {
    float* const column = bounds + k;
    float largest = column[0];
    for (int64_t n = 1; n < layers; ++n) largest = std::max(largest, column[n * hidden]);
    float sum = 0.0f;
    for (int64_t n = 0; n < layers; ++n) {
      column[n * hidden] = Exp(column[n * hidden] - largest);
      sum += column[n * hidden];
    }
    const float first = column[0] / sum;
    float cumulated = first;
    column[0] = 0.0f;
    for (int64_t n = 1; n < layers; ++n) {
      cumulated += column[n * hidden] / sum;
      column[n * hidden] = cumulated - first;
    }
  }
}

class Packer {
 public:
  Packer(const ModelConfig& config, const Checkpoint& checkpoint, const LoadOptions& options)
      : config_(config), checkpoint_(checkpoint), options_(options) {}

  absl::StatusOr<StoredModel::Parts> Run() {
    MMFREE_RETURN_IF_ERROR(CheckHasNorms(checkpoint_));
    MMFREE_RETURN_IF_ERROR(FindSources());
    MMFREE_RETURN_IF_ERROR(CheckNothingElse());
    MMFREE_ASSIGN_OR_RETURN(parts_.region, Region::Allocate(parts_.layout.bytes));
    uint8_t* const base = parts_.region.mutable_data();
    const size_t count = parts_.layout.tensors.size();
    parts_.scales.assign(count, 0.0f);
    parts_.sha256.resize(count);
    for (const PackedTensor& tensor : parts_.layout.tensors) {
      parts_.data.push_back(base + tensor.offset);
    }
    MMFREE_RETURN_IF_ERROR(ComputeLowerBounds());

    std::vector<absl::Status> statuses(count);
    std::atomic<int64_t> done{0};
    std::atomic<bool> failed{false};
    ParallelFor(
        static_cast<int64_t>(count), options_.threads,
        [&](int64_t t) {
          if (failed) return;
          statuses[t] = Convert(t, base + parts_.layout.tensors[t].offset);
          if (!statuses[t].ok()) failed = true;
          done += SourceBytes(t);
        },
        [&] {
          if (options_.progress && done < total_bytes_) options_.progress(done, total_bytes_);
        });
    for (absl::Status& status : statuses) MMFREE_RETURN_IF_ERROR(std::move(status));
    if (options_.progress) options_.progress(total_bytes_, total_bytes_);
    parts_.digest =
        ModelDigest(config_, parts_.embedding_dtype, parts_.layout, parts_.scales, parts_.sha256);
    return std::move(parts_);
  }

 private:
  absl::Status FindSources() {
    parts_.config = config_;
    const std::vector<int64_t> embedding_shape = {config_.vocab_size, config_.hidden_size};
    MMFREE_ASSIGN_OR_RETURN(const Checkpoint::Entry embedding,
                            FindFloat(checkpoint_, kEmbeddingName, embedding_shape));
    parts_.embedding_dtype = EmbeddingDType(embedding.tensor->type);
    if (config_.use_lower_bound) {
      const std::vector<int64_t> shape = {config_.num_layers, config_.hidden_size};
      MMFREE_ASSIGN_OR_RETURN(lower_bounds_, FindFloat(checkpoint_, kLowerBoundsName, shape));
    }
    parts_.layout = MakePackedLayout(config_, parts_.embedding_dtype);
    for (const PackedTensor& tensor : parts_.layout.tensors) {
      if (tensor.lower_bound_layer >= 0) {
        sources_.emplace_back();
        continue;
      }
      std::vector<int64_t> shape = {tensor.cols};
      if (tensor.kind != PackedTensor::Kind::kVector) shape = {tensor.rows, tensor.cols};
      MMFREE_ASSIGN_OR_RETURN(sources_.emplace_back(), FindFloat(checkpoint_, tensor.name, shape));
      total_bytes_ += sources_.back().tensor->bytes;
    }
    return absl::OkStatus();
  }

  // A tensor that nobody reads (a bias, a convolution) means a model that we would compute wrongly.
  absl::Status CheckNothingElse() const {
    absl::flat_hash_set<absl::string_view> used = {kLowerBoundsName};
    for (const PackedTensor& tensor : parts_.layout.tensors) used.insert(tensor.name);
    const std::string* unexpected = nullptr;
    for (const auto& [name, entry] : checkpoint_.entries()) {
      if (used.contains(name)) continue;
      if (unexpected == nullptr || name < *unexpected) unexpected = &name;
    }
    if (unexpected == nullptr) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat(Where(*checkpoint_.Find(*unexpected)),
                                                 ": not part of the supported model with ",
                                                 config_.num_layers, " layers"));
  }

  absl::Status ComputeLowerBounds() {
    const int64_t hidden = config_.hidden_size;
    bounds_.assign(static_cast<size_t>(config_.num_layers * hidden), 0.0f);
    if (!config_.use_lower_bound) return absl::OkStatus();
    const TensorView& tensor = *lower_bounds_.tensor;
    if (!ConvertToFloat(tensor.type, tensor.data, config_.num_layers * hidden, bounds_.data())) {
      return NotFinite(lower_bounds_);
    }
    CumulateLowerBounds(config_.num_layers, hidden, bounds_.data());
    return absl::OkStatus();
  }

  int64_t SourceBytes(int64_t t) const {
    return sources_[t].tensor == nullptr ? 0 : sources_[t].tensor->bytes;
  }

  static absl::Status NotFinite(const Checkpoint::Entry& entry) {
    return absl::InvalidArgumentError(
        absl::StrCat(Where(entry), ": has a value that is infinite or NaN"));
  }

  // Fills one tensor of the layout and hashes it.
  absl::Status Convert(int64_t t, uint8_t* out) {
    const PackedTensor& tensor = parts_.layout.tensors[t];
    const Checkpoint::Entry& source = sources_[t];
    if (source.tensor == nullptr) {
      memcpy(out, bounds_.data() + tensor.lower_bound_layer * tensor.cols,
             static_cast<size_t>(tensor.cols) * sizeof(float));
    } else {
      switch (tensor.kind) {
        case PackedTensor::Kind::kTernary: {
          MMFREE_ASSIGN_OR_RETURN(parts_.scales[t], PackMatrix(source, out));
          break;
        }
        case PackedTensor::Kind::kVector:
          if (!ConvertToFloat(source.tensor->type, source.tensor->data, tensor.cols,
                              reinterpret_cast<float*>(out))) {
            return NotFinite(source);
          }
          break;
        case PackedTensor::Kind::kEmbedding:
          MMFREE_RETURN_IF_ERROR(CopyEmbedding(source, out));
          break;
      }
      // A checkpoint is several times as large as what is made of it.
      GiveBack({source.tensor->data, static_cast<size_t>(source.tensor->bytes)});
    }
    parts_.sha256[t] = Sha256Hex(absl::MakeConstSpan(out, static_cast<size_t>(tensor.bytes)));
    return absl::OkStatus();
  }

  // Two passes over the rows: the mean of |W|, then the codes. Sums of rows are added in rising
  // order. Returns the scale.
  static absl::StatusOr<float> PackMatrix(const Checkpoint::Entry& source, uint8_t* out) {
    const TensorView& tensor = *source.tensor;
    const int64_t rows = tensor.shape[0];
    const int64_t cols = tensor.shape[1];
    const int64_t row_bytes = cols * TensorTypeBytes(tensor.type);
    std::vector<float> values(static_cast<size_t>(kTernaryRowGroup * cols));
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!ConvertToFloat(tensor.type, tensor.data + r * row_bytes, cols, values.data())) {
        return NotFinite(source);
      }
      sum += RowAbsSum(values.data(), cols);
    }
    const float scale = TernaryScale(sum, rows * cols);
    for (int64_t first = 0; first < rows; first += kTernaryRowGroup) {
      const int64_t used = std::min(kTernaryRowGroup, rows - first);
      const float* group[kTernaryRowGroup];
      for (int64_t j = 0; j < used; ++j) {
        float* const row = values.data() + j * cols;
        ConvertToFloat(tensor.type, tensor.data + (first + j) * row_bytes, cols, row);
        group[j] = row;
      }
      PackRowGroup(absl::MakeConstSpan(group, static_cast<size_t>(used)), cols, scale,
                   out + first / kTernaryRowGroup * TernaryMatrix::PaddedCols(cols));
    }
    return scale;
  }

  static absl::Status CopyEmbedding(const Checkpoint::Entry& source, uint8_t* out) {
    const TensorView& tensor = *source.tensor;
    const int64_t cols = tensor.shape[1];
    std::vector<float> values(static_cast<size_t>(cols));
    for (int64_t r = 0; r < tensor.shape[0]; ++r) {
      const uint8_t* const row = tensor.data + r * cols * TensorTypeBytes(tensor.type);
      if (!ConvertToFloat(tensor.type, row, cols, values.data())) return NotFinite(source);
    }
    memcpy(out, tensor.data, static_cast<size_t>(tensor.bytes));
    return absl::OkStatus();
  }

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const LoadOptions& options_;
  StoredModel::Parts parts_;
  std::vector<Checkpoint::Entry> sources_;  // by tensor of the layout; empty for a lower bound
  Checkpoint::Entry lower_bounds_;
  std::vector<float> bounds_;  // [L, D] lb_n
  int64_t total_bytes_ = 0;
};

}  // namespace

absl::StatusOr<StoredModel::Parts> LoadPublished(const ModelConfig& config,
                                                 const Checkpoint& checkpoint,
                                                 const LoadOptions& options) {
  return Packer(config, checkpoint, options).Run();
}

}  // namespace mmfree
