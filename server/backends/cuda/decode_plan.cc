#include "server/backends/cuda/decode_plan.h"

#include <cuda_runtime.h>

#include <cstddef>

#include "server/backends/cuda/layout.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

using Kernels = CudaBackendOptions::Kernels;

// Makes the stages of steps of `rows` rows.
class StageMaker {
 public:
  StageMaker(const ModelConfig& config, const DeviceModel& model, const Workspace& workspace,
             int32_t rows)
      : config_(config), model_(model), workspace_(workspace), rows_(rows) {}

  std::vector<DecodeArgs> All() const {
    std::vector<DecodeArgs> stages;
    float* states = workspace_.states;
    for (const DeviceLayer& layer : model_.layers()) {
      stages.push_back(Attention(layer, states));
      stages.push_back(Output(layer));
      stages.push_back(Gate(layer));
      stages.push_back(Down(layer));
      states += config_.hidden_size;
    }
    stages.push_back(Head());
    return stages;
  }

 private:
  // Gated outputs of the recurrence; `values` begins with g.
  float* gated() const { return workspace_.values + rows_ * workspace_.ld_dim; }

  // Reads and writes the residual stream, unless changed.
  DecodeArgs Stage(NormKind kind, Epilogue epilogue, int64_t cols) const {
    DecodeArgs args;
    args.kind = kind;
    args.epilogue = epilogue;
    args.max_rows = rows_;
    args.num_rows = &workspace_.in.counts->tokens;
    args.cols = static_cast<int32_t>(cols);
    args.padded_cols = static_cast<int32_t>(RoundUp(cols, kColumnBlock));
    args.eps = config_.rms_norm_eps;
    args.x = workspace_.h;
    args.ld_x = static_cast<int32_t>(workspace_.ld_dim);
    args.out = workspace_.h;
    args.ld = workspace_.ld_dim;
    return args;
  }

  DecodeArgs Attention(const DeviceLayer& layer, float* states) const {
    DecodeArgs stage = Stage(NormKind::kAttention, Epilogue::kRecurrence, config_.hidden_size);
    stage.w1 = layer.attn_norm;
    stage.w2[0] = layer.i_norm;
    stage.w2[1] = layer.f_norm;
    stage.w2[2] = layer.g_norm_in;
    stage.weights = layer.ifg;
    stage.out = workspace_.values;
    stage.gated = gated();
    stage.g_norm = layer.g_norm;
    stage.lower_bound = layer.lower_bound;
    stage.states = states;
    stage.state_stride = workspace_.state_stride;
    stage.rows = workspace_.in.rows;
    return stage;
  }

  DecodeArgs Output(const DeviceLayer& layer) const {
    DecodeArgs stage = Stage(NormKind::kScanned, Epilogue::kResidual, config_.hidden_size);
    stage.x = workspace_.values;
    stage.y = gated();
    stage.w2[0] = layer.o_norm;
    stage.weights = layer.o;
    return stage;
  }

  DecodeArgs Gate(const DeviceLayer& layer) const {
    DecodeArgs stage = Stage(NormKind::kHidden, Epilogue::kSwiGlu, config_.hidden_size);
    stage.w1 = layer.mlp_norm;
    stage.w2[0] = layer.gate_norm;
    stage.weights = layer.gate;
    stage.out = workspace_.z;
    stage.ld = workspace_.ld_channels;
    return stage;
  }

  DecodeArgs Down(const DeviceLayer& layer) const {
    DecodeArgs stage = Stage(NormKind::kOneNorm, Epilogue::kResidual, config_.intermediate_size);
    stage.x = workspace_.z;
    stage.ld_x = static_cast<int32_t>(workspace_.ld_channels);
    stage.w2[0] = layer.down_norm;
    stage.weights = layer.down;
    return stage;
  }

  DecodeArgs Head() const {
    DecodeArgs stage = Stage(NormKind::kHidden, Epilogue::kStore, config_.hidden_size);
    stage.num_rows = &workspace_.in.counts->heads;
    stage.gather = workspace_.in.heads;
    stage.w1 = model_.final_norm();
    stage.w2[0] = model_.lm_head_norm();
    stage.weights = model_.lm_head();
    stage.out = workspace_.logits;
    stage.ld = workspace_.ld_vocab;
    return stage;
  }

  const ModelConfig& config_;
  const DeviceModel& model_;
  const Workspace& workspace_;
  const int32_t rows_;
};

// As measured (decision 0209): a stage of one row of a small model takes no longer as a kernel.
bool PersistentIsQuicker(const ModelConfig& config, int32_t rows) {
  return rows > 1 || config.hidden_size >= 1024;
}

// Every place is missing but those that no stage writes: the recurrence's outputs from `cols` up to
// `ld`, which are zeros.
absl::Status ClearExchange(const PersistentExchange& exchange, int32_t rows, int64_t ld,
                           int64_t cols) {
  constexpr int kMissingByte = kExchangeMissing & 0xff;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemset(exchange.state, 0, sizeof(*exchange.state)));
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaMemset(exchange.first, kMissingByte,
                 sizeof(float) * kExchangeSets * static_cast<size_t>(exchange.set_floats)));
  if (cols == ld) return absl::OkStatus();
  for (int32_t set = 0; set < kExchangeSets; ++set) {
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaMemset2D(exchange.first + int64_t{set} * exchange.set_floats + cols, sizeof(float) * ld,
                     0, sizeof(float) * (ld - cols), 2 * static_cast<size_t>(rows)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<DecodePlan> DecodePlan::Create(const ModelConfig& config, const DeviceModel& model,
                                              const Workspace& workspace, Kernels kernels,
                                              const LaunchContext& context) {
  DecodePlan plan;
  if (kernels == Kernels::kGeneric || kernels == Kernels::kWide ||
      !DecodeFits(config.hidden_size, config.intermediate_size, context.shared_bytes_per_block)) {
    return plan;
  }
  plan.max_rows_ = kMaxDecodeRows;
  bool fits[kMaxDecodeRows] = {};
  for (int32_t rows = 1; rows <= kMaxDecodeRows; ++rows) {
    ForRows& for_rows = plan.plans_[rows - 1];
    for_rows.stages = StageMaker(config, model, workspace, rows).All();
    for_rows.persistent.weights = model.stacked_weights();
    const bool wanted = kernels == Kernels::kPersistent ||
                        (kernels == Kernels::kAuto && PersistentIsQuicker(config, rows));
    fits[rows - 1] = wanted && PlanPersistentDecode(for_rows.stages.data(),
                                                    static_cast<int32_t>(for_rows.stages.size()),
                                                    rows, context, &for_rows.persistent);
    // As measured (decision 0208): the kernels for many rows, where they have wgmma, take two rows
    // sooner than a kernel a stage does.
    if (kernels == Kernels::kAuto && context.hopper && rows > 1 && !fits[rows - 1]) {
      plan.max_rows_ = rows - 1;
      break;
    }
  }
  MMFREE_RETURN_IF_ERROR(plan.Upload(config, fits));
  return plan;
}

int64_t DecodePlan::Bind(const ModelConfig& config, std::byte* base,
                         std::array<DecodeArgs*, kMaxDecodeRows>* stages) {
  const int64_t ld_dim = RoundUp(config.hidden_size, kRowAlign);
  const int64_t ld_channels = RoundUp(config.intermediate_size, kRowAlign);
  Carver carver(base);
  for (int32_t rows = 1; rows <= kMaxDecodeRows; ++rows) {
    PersistentExchange& exchange = plans_[rows - 1].persistent.exchange;
    (*stages)[rows - 1] = carver.Take<DecodeArgs>(4 * config.num_layers + 1);
    exchange.state = carver.Take<ExchangeState>(1);
    exchange.set_floats = static_cast<int32_t>(rows * (4 * ld_dim + ld_channels));
    exchange.first = carver.Take<float>(int64_t{kExchangeSets} * exchange.set_floats);
  }
  return carver.bytes();
}

int64_t DecodePlan::Bytes(const ModelConfig& config) {
  std::array<DecodeArgs*, kMaxDecodeRows> stages;
  return DecodePlan().Bind(config, nullptr, &stages);
}

absl::Status DecodePlan::Upload(const ModelConfig& config, absl::Span<const bool> fits) {
  std::array<DecodeArgs*, kMaxDecodeRows> stages;
  MMFREE_ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(Bytes(config)));
  Bind(config, memory_.data(), &stages);
  for (int32_t n = 0; n < kMaxDecodeRows; ++n) {
    ForRows& plan = plans_[n];
    if (!fits[n]) continue;
    const DecodeArgs& first = plan.stages.front();
    MMFREE_RETURN_IF_ERROR(ClearExchange(plan.persistent.exchange, n + 1, first.ld_x, first.cols));
    MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpy(stages[n], plan.stages.data(),
                                           plan.stages.size() * sizeof(DecodeArgs),
                                           cudaMemcpyHostToDevice));
    plan.persistent.stages = stages[n];
  }
  MMFREE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  return absl::OkStatus();
}

PersistentDecodeArgs DecodePlan::persistent_args(int32_t rows, bool with_head) const {
  PersistentDecodeArgs args = plans_[rows - 1].persistent;
  args.num_stages = 4 * args.weights.layers + (with_head ? 1 : 0);
  return args;
}

}  // namespace mmfree::cuda
