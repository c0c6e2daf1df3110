#include "server/backends/cuda/forward.h"

#include <cstddef>

#include "absl/types/span.h"

namespace mmfree::cuda {
namespace {

#define RETURN_IF_FAILED(call)                                                \
  do {                                                                        \
    if (const cudaError_t error = (call); error != cudaSuccess) return error; \
  } while (false)

// Rows of the activation codes: whole groups of eight, the period of their swizzle.
int32_t StrideOf(int32_t rows) { return static_cast<int32_t>(RoundUp(rows, 8)); }

}  // namespace

QuantizeArgs Forward::Norm(NormKind kind, int64_t cols, int32_t stride) const {
  QuantizeArgs args;
  args.kind = kind;
  args.cols = static_cast<int32_t>(cols);
  args.padded_cols = static_cast<int32_t>(RoundUp(cols, kColumnBlock));
  args.eps = config_.rms_norm_eps;
  args.x = workspace_.h;
  args.ld_x = workspace_.ld_dim;
  args.num_rows = &workspace_.in.counts->tokens;
  args.q = workspace_.q;
  args.meta = workspace_.meta;
  args.stride = stride;
  return args;
}

cudaError_t Forward::Product(const GemmArgs& args) const {
  return context_.hopper ? LaunchGemmWgmma(args, context_) : LaunchGemmMma(args, context_);
}

cudaError_t Forward::AttentionBlock(const DeviceLayer& layer, float* states, float* kept,
                                    const StepShape& shape) const {
  const int32_t stride = StrideOf(shape.tokens);
  const int64_t matrix = shape.tokens * workspace_.ld_dim;
  const float* const input = workspace_.values;
  float* const forget = workspace_.values + matrix;
  const float* const g = workspace_.values + 2 * matrix;

  QuantizeArgs norm = Norm(NormKind::kAttention, config_.hidden_size, stride);
  norm.w1 = layer.attn_norm;
  norm.w2[0] = layer.i_norm;
  norm.w2[1] = layer.f_norm;
  norm.w2[2] = layer.g_norm_in;
  RETURN_IF_FAILED(LaunchQuantize(norm, shape.tokens, context_));

  GemmArgs product;
  product.weights = layer.ifg;
  product.epilogue = Epilogue::kStore;
  product.q = workspace_.q;
  product.meta = workspace_.meta;
  product.stride = stride;
  product.max_tokens = shape.tokens;
  product.out = workspace_.values;
  product.ld = workspace_.ld_dim;
  product.matrix_stride = matrix;
  RETURN_IF_FAILED(Product(product));

  norm =
      Norm(shape.decode ? NormKind::kRecurrent : NormKind::kScanned, config_.hidden_size, stride);
  norm.x = g;
  norm.w1 = layer.g_norm;
  norm.w2[0] = layer.o_norm;
  if (shape.decode) {
    norm.forget = forget;
    norm.input = input;
    norm.lower_bound = layer.lower_bound;
    norm.states = states;
    norm.state_stride = workspace_.state_stride;
    norm.rows = workspace_.in.rows;
  } else {
    ScanArgs scan;
    scan.forget = forget;
    scan.input = input;
    scan.g = g;
    scan.ld = workspace_.ld_dim;
    scan.g_norm = layer.g_norm;
    scan.lower_bound = layer.lower_bound;
    scan.states = states;
    scan.state_stride = workspace_.state_stride;
    scan.dim = static_cast<int32_t>(config_.hidden_size);
    scan.kept = kept;
    scan.rows = workspace_.in.rows;
    scan.counts = workspace_.in.counts;
    scan.y = forget;
    RETURN_IF_FAILED(LaunchScan(scan, shape.short_rows, shape.long_rows, context_));
    norm.y = forget;
  }
  RETURN_IF_FAILED(LaunchQuantize(norm, shape.tokens, context_));

  product.weights = layer.o;
  product.epilogue = Epilogue::kResidual;
  product.out = workspace_.h;
  product.matrix_stride = 0;
  return Product(product);
}

cudaError_t Forward::MlpBlock(const DeviceLayer& layer, const StepShape& shape) const {
  const int32_t stride = StrideOf(shape.tokens);
  QuantizeArgs norm = Norm(NormKind::kHidden, config_.hidden_size, stride);
  norm.w1 = layer.mlp_norm;
  norm.w2[0] = layer.gate_norm;
  RETURN_IF_FAILED(LaunchQuantize(norm, shape.tokens, context_));

  GemmArgs product;
  product.weights = layer.gate;
  product.epilogue = Epilogue::kSwiGlu;
  product.q = workspace_.q;
  product.meta = workspace_.meta;
  product.stride = stride;
  product.max_tokens = shape.tokens;
  product.out = workspace_.z;
  product.ld = workspace_.ld_channels;
  RETURN_IF_FAILED(Product(product));

  norm = Norm(NormKind::kOneNorm, config_.intermediate_size, stride);
  norm.x = workspace_.z;
  norm.ld_x = workspace_.ld_channels;
  norm.w2[0] = layer.down_norm;
  RETURN_IF_FAILED(LaunchQuantize(norm, shape.tokens, context_));

  product.weights = layer.down;
  product.epilogue = Epilogue::kResidual;
  product.out = workspace_.h;
  product.ld = workspace_.ld_dim;
  return Product(product);
}

cudaError_t Forward::Begin(const StepInputs& host, int32_t tokens) const {
  RETURN_IF_FAILED(LaunchLoadInputs(host, workspace_.in, context_));
  return LaunchEmbed(model_.embedding(), model_.embedding_type(), config_.hidden_size,
                     workspace_.in, tokens, workspace_.h, workspace_.ld_dim, context_);
}

cudaError_t Forward::FewRows(int32_t rows, bool head) const {
  if (plan_.persistent(rows)) {
    return LaunchPersistentDecode(plan_.persistent_args(rows, head), rows, context_);
  }
  absl::Span<const DecodeArgs> stages = plan_.stages(rows);
  if (!head) stages.remove_suffix(1);
  for (const DecodeArgs& stage : stages) RETURN_IF_FAILED(LaunchDecode(stage, context_));
  return cudaSuccess;
}

cudaError_t Forward::Layers(const StepInputs& host, const StepShape& shape) const {
  RETURN_IF_FAILED(Begin(host, shape.tokens));
  if (shape.decode) {
    if (const ClusterDecodeArgs* args = clusters_.For(shape.tokens)) {
      return LaunchClusterDecode(*args, shape.tokens, context_);
    }
    if (shape.tokens <= plan_.max_rows()) return FewRows(shape.tokens, false);
  }
  float* states = workspace_.states;
  float* kept = workspace_.kept;
  for (const DeviceLayer& layer : model_.layers()) {
    RETURN_IF_FAILED(AttentionBlock(layer, states, kept, shape));
    RETURN_IF_FAILED(MlpBlock(layer, shape));
    states += config_.hidden_size;
    kept += config_.hidden_size;
  }
  return cudaSuccess;
}

cudaError_t Forward::Step(const StepInputs& host, const StepShape& shape, HeadOutput* out) const {
  const int32_t rows = shape.tokens;
  if (!shape.decode || rows > plan_.max_rows() || clusters_.For(rows) != nullptr) {
    RETURN_IF_FAILED(Layers(host, shape));
    return out == nullptr ? cudaSuccess : Head(0, rows, out);
  }
  RETURN_IF_FAILED(Begin(host, rows));
  RETURN_IF_FAILED(FewRows(rows, out != nullptr));
  return out == nullptr ? cudaSuccess : Sample(0, rows, out);
}

cudaError_t Forward::HeadLogits(int32_t first, int32_t rows) const {
  if (rows <= plan_.max_rows() && first == 0) {
    return LaunchDecode(plan_.stages(rows).back(), context_);
  }
  const int32_t stride = StrideOf(rows);
  QuantizeArgs norm = Norm(NormKind::kHidden, config_.hidden_size, stride);
  norm.gather = workspace_.in.heads;
  norm.row_offset = first;
  norm.num_rows = &workspace_.in.counts->heads;
  norm.w1 = model_.final_norm();
  norm.w2[0] = model_.lm_head_norm();
  RETURN_IF_FAILED(LaunchQuantize(norm, rows, context_));

  GemmArgs product;
  product.weights = model_.lm_head();
  product.epilogue = Epilogue::kStore;
  product.q = workspace_.q;
  product.meta = workspace_.meta;
  product.stride = stride;
  product.max_tokens = rows;
  product.out = workspace_.logits;
  product.ld = workspace_.ld_vocab;
  return Product(product);
}

cudaError_t Forward::Sample(int32_t first, int32_t rows, HeadOutput* out) const {
  return LaunchSample(workspace_.logits, workspace_.ld_vocab,
                      static_cast<int32_t>(config_.vocab_size), workspace_.in, first, rows,
                      workspace_.stats, out, context_);
}

cudaError_t Forward::Head(int32_t first, int32_t rows, HeadOutput* out) const {
  RETURN_IF_FAILED(HeadLogits(first, rows));
  return Sample(first, rows, out);
}

#undef RETURN_IF_FAILED

}  // namespace mmfree::cuda
