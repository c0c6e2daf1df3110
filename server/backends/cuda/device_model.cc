#include "server/backends/cuda/device_model.h"

#include <algorithm>
#include <utility>

#include "absl/types/span.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

int64_t ElementBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

EmbeddingType ToEmbeddingType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return EmbeddingType::kF32;
    case DType::kF16:
      return EmbeddingType::kF16;
    case DType::kBF16:
      return EmbeddingType::kBF16;
  }
  return EmbeddingType::kF32;
}

int64_t MatrixBytes(const DeviceMatrix& matrix) {
  return int64_t{matrix.row_blocks} * matrix.k_blocks * kBlockBytes;
}

// `slots` is the number of rows after pairing: 2 * RoundUp(F, 32) for a gated matrix.
DeviceMatrix TakeMatrix(Carver& carver, int32_t matrices, int64_t slots, int64_t cols) {
  DeviceMatrix matrix;
  matrix.matrices = matrices;
  matrix.row_blocks = static_cast<int32_t>(CeilDiv(slots, kRowBlock));
  matrix.k_blocks = static_cast<int32_t>(CeilDiv(cols, kColumnBlock));
  matrix.codes = carver.Take<uint8_t>(matrices * MatrixBytes(matrix));
  return matrix;
}

// Copies host data into the arena; the arena is the model's own, so casting const away is sound.
class Uploader {
 public:
  static absl::StatusOr<Uploader> Create(int64_t staging_bytes) {
    Uploader uploader;
    cudaStream_t stream = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    uploader.stream_ = Stream(stream);
    MMFREE_ASSIGN_OR_RETURN(uploader.staging_, DeviceBuffer::Allocate(staging_bytes));
    return uploader;
  }

  absl::Status Vector(absl::Span<const float> from, const float* to) {
    return Bytes(from.data(), from.size() * sizeof(float), to);
  }

  absl::Status Bytes(const void* from, int64_t bytes, const void* to) {
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(const_cast<void*>(to), from, bytes, cudaMemcpyHostToDevice, stream_.get()));
    return absl::OkStatus();
  }

  absl::Status Matrix(const TernaryMatrix& from, int64_t gated_channels, int index,
                      DeviceMatrix* to) {
    const uint8_t* const stored = reinterpret_cast<const uint8_t*>(staging_.data());
    MMFREE_RETURN_IF_ERROR(Bytes(from.codes, from.bytes(), stored));
    MMFREE_CUDA_RETURN_IF_ERROR(LaunchRepack(
        stored, from.rows, from.cols, from.padded_cols(), gated_channels, to->row_blocks,
        to->k_blocks, const_cast<uint8_t*>(to->codes) + index * MatrixBytes(*to), stream_.get()));
    to->scale[index] = from.scale;
    return absl::OkStatus();
  }

  absl::Status Finish() {
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    return absl::OkStatus();
  }

 private:
  Uploader() = default;

  Stream stream_;
  DeviceBuffer staging_;
};

absl::Status UploadLayer(const LayerWeights& from, int64_t channels, Uploader& upload,
                         DeviceLayer& to) {
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.attn_norm, to.attn_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.i_norm, to.i_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.f_norm, to.f_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.g_norm_in, to.g_norm_in));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.g_norm, to.g_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.o_norm, to.o_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.mlp_norm, to.mlp_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.gate_norm, to.gate_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.down_norm, to.down_norm));
  MMFREE_RETURN_IF_ERROR(upload.Vector(from.lower_bound, to.lower_bound));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(from.i, 0, 0, &to.ifg));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(from.f, 0, 1, &to.ifg));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(from.g, 0, 2, &to.ifg));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(from.o, 0, 0, &to.o));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(from.gate, channels, 0, &to.gate));
  return upload.Matrix(from.down, 0, 0, &to.down);
}

}  // namespace

int64_t DeviceModel::Bind(const ModelConfig& config, DType embedding, std::byte* base) {
  const int64_t dim = config.hidden_size;
  const int64_t channels = config.intermediate_size;
  const int64_t padded_dim = RoundUp(dim, kColumnBlock);
  const int64_t gate_slots = 2 * RoundUp(channels, kRowBlock / 2);
  Carver carver(base);
  layers_.resize(config.num_layers);
  for (DeviceLayer& layer : layers_) {
    for (const float** vector :
         {&layer.attn_norm, &layer.i_norm, &layer.f_norm, &layer.g_norm_in, &layer.g_norm,
          &layer.o_norm, &layer.mlp_norm, &layer.gate_norm, &layer.lower_bound}) {
      *vector = carver.Take<float>(padded_dim);
    }
    layer.down_norm = carver.Take<float>(RoundUp(channels, kColumnBlock));
    layer.ifg = TakeMatrix(carver, 3, dim, dim);
    layer.o = TakeMatrix(carver, 1, dim, dim);
    layer.gate = TakeMatrix(carver, 1, gate_slots, dim);
    layer.down = TakeMatrix(carver, 1, dim, channels);
  }
  final_norm_ = carver.Take<float>(padded_dim);
  lm_head_norm_ = carver.Take<float>(padded_dim);
  lm_head_ = TakeMatrix(carver, 1, config.vocab_size, dim);
  embedding_ = carver.Take<uint8_t>(config.vocab_size * dim * ElementBytes(embedding));
  embedding_type_ = ToEmbeddingType(embedding);
  return carver.bytes();
}

StackedWeights DeviceModel::stacked_weights() const {
  // Bind takes the same for every layer.
  const uint8_t* const first = layers_[0].ifg.codes;
  const int64_t stride = layers_.size() > 1 ? layers_[1].ifg.codes - first : 0;
  return {first, static_cast<uint32_t>(stride / 16), static_cast<int32_t>(layers_.size())};
}

int64_t DeviceModel::Bytes(const ModelConfig& config, DType embedding) {
  return DeviceModel().Bind(config, embedding, nullptr);
}

int64_t DeviceModel::StagingBytes(const ModelConfig& config) {
  const int64_t dim = config.hidden_size;
  return std::max({TernaryMatrix::Bytes(config.vocab_size, dim),
                   TernaryMatrix::Bytes(2 * config.intermediate_size, dim),
                   TernaryMatrix::Bytes(dim, config.intermediate_size),
                   TernaryMatrix::Bytes(dim, dim)});
}

absl::StatusOr<DeviceModel> DeviceModel::Upload(const Model& model) {
  const ModelConfig& config = model.config();
  const DType dtype = model.embedding().dtype;
  DeviceModel device;
  MMFREE_ASSIGN_OR_RETURN(device.memory_, DeviceBuffer::Allocate(Bytes(config, dtype)));
  device.Bind(config, dtype, device.memory_.data());
  // The padding of vectors; everything else is written in full.
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemset(device.memory_.data(), 0, device.memory_.size()));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());

  MMFREE_ASSIGN_OR_RETURN(Uploader upload, Uploader::Create(StagingBytes(config)));
  for (size_t n = 0; n < device.layers_.size(); ++n) {
    MMFREE_RETURN_IF_ERROR(
        UploadLayer(model.layers()[n], config.intermediate_size, upload, device.layers_[n]));
  }
  MMFREE_RETURN_IF_ERROR(upload.Vector(model.final_norm(), device.final_norm_));
  MMFREE_RETURN_IF_ERROR(upload.Vector(model.lm_head_norm(), device.lm_head_norm_));
  MMFREE_RETURN_IF_ERROR(upload.Matrix(model.lm_head(), 0, 0, &device.lm_head_));
  MMFREE_RETURN_IF_ERROR(upload.Bytes(model.embedding().data,
                                      config.vocab_size * config.hidden_size * ElementBytes(dtype),
                                      device.embedding_));
  MMFREE_RETURN_IF_ERROR(upload.Finish());
  return device;
}

}  // namespace mmfree::cuda
