#include "server/backends/cuda/workspace.h"

#include <algorithm>

#include "server/backends/backend.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

// Logits of this many rows exist at a time; steps with more heads take turns.
constexpr int32_t kMaxHeadRows = 1024;

int64_t KeptStates(const Workspace::Sizes& sizes) {
  return std::min(kMaxKeptStates, sizes.max_step_tokens - 1);
}

}  // namespace

StepInputs Workspace::TakeInputs(const Sizes& sizes, Carver& carver) {
  StepInputs in;
  in.counts = carver.Take<StepCounts>(1);
  in.tokens = carver.Take<int32_t>(sizes.max_step_tokens);
  in.rows = carver.Take<RowInput>(sizes.max_step_tokens);
  in.heads = carver.Take<HeadInput>(sizes.max_step_tokens);
  in.banned = carver.Take<int32_t>(int64_t{sizes.max_step_tokens} * kMaxBannedTokens);
  return in;
}

int64_t Workspace::Bind(const ModelConfig& config, const Sizes& sizes, std::byte* base) {
  const int64_t tokens = sizes.max_step_tokens;
  const int64_t k_blocks = std::max(3 * CeilDiv(config.hidden_size, kColumnBlock),
                                    CeilDiv(config.intermediate_size, kColumnBlock));
  ld_dim = RoundUp(config.hidden_size, kRowAlign);
  ld_channels = RoundUp(config.intermediate_size, kRowAlign);
  ld_vocab = RoundUp(config.vocab_size, kRowAlign);
  state_stride = config.state_floats();
  head_rows = static_cast<int32_t>(std::min<int64_t>(tokens, kMaxHeadRows));

  Carver carver(base);
  states = carver.Take<float>(sizes.all_slots() * state_stride);
  kept = carver.Take<float>(KeptStates(sizes) * state_stride);
  h = carver.Take<float>(tokens * ld_dim);
  values = carver.Take<float>(tokens * std::max(3 * ld_dim, ld_channels));
  z = values;
  q = carver.Take<int8_t>((k_blocks * RoundUp(tokens, 8) + kRowSlack) * kColumnBlock);
  meta = carver.Take<RowMeta>(3 * RoundUp(tokens, 8) + kRowSlack);
  logits = carver.Take<float>(head_rows * ld_vocab);
  stats = carver.Take<HeadStats>(head_rows);
  in = TakeInputs(sizes, carver);
  return carver.bytes();
}

int64_t Workspace::Bytes(const ModelConfig& config, const Sizes& sizes) {
  return Workspace().Bind(config, sizes, nullptr);
}

int64_t Workspace::StateBytes(const ModelConfig& config, const Sizes& sizes) {
  return sizes.all_slots() * config.state_floats() * static_cast<int64_t>(sizeof(float));
}

int64_t Workspace::KeptBytes(const ModelConfig& config, const Sizes& sizes) {
  return KeptStates(sizes) * config.state_floats() * static_cast<int64_t>(sizeof(float));
}

absl::StatusOr<Workspace> Workspace::Create(const ModelConfig& config, const Sizes& sizes) {
  Workspace workspace;
  MMFREE_ASSIGN_OR_RETURN(workspace.memory_, DeviceBuffer::Allocate(Bytes(config, sizes)));
  workspace.Bind(config, sizes, workspace.memory_.data());
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemset(workspace.memory_.data(), 0, workspace.memory_.size()));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  return workspace;
}

}  // namespace mmfree::cuda
