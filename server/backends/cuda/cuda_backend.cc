#include "server/backends/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/backends/cuda/cluster_plan.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/decode_plan.h"
#include "server/backends/cuda/device.h"
#include "server/backends/cuda/device_draws.h"
#include "server/backends/cuda/device_model.h"
#include "server/backends/cuda/forward.h"
#include "server/backends/cuda/state_reader.h"
#include "server/backends/cuda/step_inputs.h"
#include "server/backends/cuda/workspace.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace cuda {
namespace {

constexpr int32_t kMaxSlots = 1 << 20;
constexpr int32_t kMaxStepTokens = 1 << 17;

// The smallest capacity of a captured step that holds `rows`: exact up to 8, then four to each
// power of two.
int32_t BatchBucket(int32_t rows) {
  if (rows <= 8) return rows;
  int32_t power = 8;
  while (2 * power < rows) power *= 2;
  const int32_t quarter = power / 4;
  return static_cast<int32_t>(RoundUp(rows, quarter));
}

// Speculative steps of more tokens take longer on the device than their launches do.
constexpr int32_t kMaxSpeculativeGraphTokens = 256;

// What one captured step serves.
struct GraphKey {
  int32_t tokens = 0;  // and rows, and heads: at most
  bool head = false;
  bool decode = false;  // every row is one token

  friend bool operator==(const GraphKey&, const GraphKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const GraphKey& key) {
    return H::combine(std::move(h), key.tokens, key.head, key.decode);
  }
};

class CudaBackend : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(const Model& model,
                                                         const CudaBackendOptions& options);

  const BackendInfo& info() const override { return info_; }
  absl::Status Step(absl::Span<const StepRow> rows, StepOutput* out) override;
  absl::Status Rewind(int32_t slot, int32_t tokens) override;
  absl::Status ZeroSlot(int32_t slot) override;
  absl::Status CopySlot(int32_t from, int32_t to) override;
  absl::Status ReadSlot(int32_t slot, absl::Span<float> state) override;
  absl::Status WriteSlot(int32_t slot, absl::Span<const float> state) override;
  absl::Status ReadResident(int32_t slot, absl::Span<float> state) override;

 private:
  CudaBackend(const ModelConfig& config, const CudaBackendOptions& options)
      : config_(config),
        options_(options),
        planner_(options.num_slots, options.max_step_tokens, config.vocab_size) {}

  absl::Status Initialize(const Model& model);
  // That it is one of slots [begin, end).
  absl::Status CheckSlot(int32_t slot, int32_t begin, int32_t end) const;
  absl::Status CheckSlot(int32_t slot) const { return CheckSlot(slot, 0, options_.num_slots); }
  absl::Status CheckFloats(size_t floats) const;
  int32_t all_slots() const { return options_.num_slots + options_.resident_slots; }
  float* SlotState(int32_t slot) const {
    return workspace_.states + slot * workspace_.state_stride;
  }
  absl::Status UseDevice() const;
  absl::Status Wait() const;
  // Whether the step is of a kind that is captured.
  bool WantsGraph() const;
  // A step without long rows in one graph launch.
  absl::Status RunGraph();
  absl::Status RunEager(StepOutput* out);
  // Copies what is asked for of the logits of heads [first, first + rows), which are in the
  // workspace, to the host.
  absl::Status CopyLogits(int32_t first, int32_t rows, StepOutput* out);
  absl::Status CopyHead(int32_t row, float* out) const;
  // Prepares the draws of the places that have a TokenSampler, while the device computes the step.
  absl::Status PlanDraws();
  // Makes the draws of heads [first, first + rows), whose logits are in the workspace, and copies
  // what is asked for of them to the host.
  absl::Status FinishHeads(int32_t first, int32_t rows, StepOutput* out);
  // The tokens of the places that have a TokenSampler.
  void CollectDraws(StepOutput* out) const;
  absl::StatusOr<cuda::GraphExec> Capture(const GraphKey& key) const;

  const ModelConfig config_;
  const CudaBackendOptions options_;
  BackendInfo info_;
  StepPlanner planner_;

  Stream stream_;
  Event resident_ready_;  // after the last copy to a resident slot
  DeviceModel model_;
  Workspace workspace_;
  DecodePlan plan_;
  ClusterPlan clusters_;
  PinnedBuffer pinned_;
  StepInputs host_in_;                   // in pinned_
  HeadOutput* host_out_ = nullptr;       // [max_step_tokens] in pinned_
  float* host_state_ = nullptr;          // [state_floats] in pinned_
  std::unique_ptr<StateReader> reader_;  // null without resident slots
  std::unique_ptr<DeviceDraws> draws_;
  std::vector<size_t> host_draws_;     // indices of the step's sampler heads whose draws are ours
  std::vector<float> sampler_logits_;  // [host_draws_, vocab_size]
  std::unique_ptr<Forward> forward_;   // refers to the members above
  absl::flat_hash_map<GraphKey, GraphExec> graphs_;
};

absl::Status CheckOptions(const CudaBackendOptions& options) {
  if (options.num_slots < 1 || options.num_slots > kMaxSlots) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_slots must be in [1, ", kMaxSlots, "], got ", options.num_slots));
  }
  if (options.resident_slots < 0 || options.resident_slots > kMaxSlots) {
    return absl::InvalidArgumentError(absl::StrCat("resident_slots must be in [0, ", kMaxSlots,
                                                   "], got ", options.resident_slots));
  }
  if (options.max_step_tokens < 1 || options.max_step_tokens > kMaxStepTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_step_tokens must be in [1, ", kMaxStepTokens, "], got ", options.max_step_tokens));
  }
  return absl::OkStatus();
}

std::string Megabytes(int64_t bytes) {
  return absl::StrFormat("%.1f MB", static_cast<double>(bytes) * 1e-6);
}

absl::Status CheckMemory(const Model& model, const Workspace::Sizes& sizes, int64_t draw_bytes,
                         const DeviceInfo& device) {
  const ModelConfig& config = model.config();
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  const int64_t weights = DeviceModel::Bytes(config, model.embedding().dtype);
  const int64_t states = Workspace::StateBytes(config, sizes);
  const int64_t kept = Workspace::KeptBytes(config, sizes);
  const int64_t activations = Workspace::Bytes(config, sizes) - states - kept + draw_bytes +
                              DecodePlan::Bytes(config) + ClusterPlan::Bytes(config);
  const int64_t needed = weights + states + kept + activations + DeviceModel::StagingBytes(config);
  if (needed <= static_cast<int64_t>(free_bytes)) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("CUDA device ", device.ordinal, " (", device.name, ") has ",
                   Megabytes(static_cast<int64_t>(free_bytes)), " free and ", Megabytes(needed),
                   " are needed: ", Megabytes(weights), " for weights, ", Megabytes(states),
                   " for ", sizes.num_slots, " states of what runs (lower --max_sessions) and ",
                   sizes.resident_slots, " of idle sessions (lower --session_device_mb), ",
                   Megabytes(kept), " for states between tokens that are fed on trial, ",
                   Megabytes(activations), " for steps of ", sizes.max_step_tokens,
                   " tokens (lower --prefill_chunk or --max_batch), the rest while loading"));
}

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(const Model& model,
                                                             const CudaBackendOptions& options) {
  MMFREE_RETURN_IF_ERROR(CheckOptions(options));
  std::unique_ptr<CudaBackend> backend(new CudaBackend(model.config(), options));
  MMFREE_RETURN_IF_ERROR(backend->Initialize(model));
  return backend;
}

absl::Status CudaBackend::Initialize(const Model& model) {
  MMFREE_ASSIGN_OR_RETURN(const DeviceInfo device, OpenDevice(options_.device));
  const int64_t max_cols = MaxQuantizeCols(device.shared_bytes_per_block);
  const int64_t cols = std::max(config_.hidden_size, config_.intermediate_size);
  if (cols > max_cols) {
    return absl::UnimplementedError(
        absl::StrCat("the CUDA backend takes hidden and intermediate sizes up to ", max_cols,
                     " on ", device.name, ", the model has ", cols));
  }
  const Workspace::Sizes sizes = {options_.num_slots, options_.resident_slots,
                                  options_.max_step_tokens};
  LaunchContext context;
  context.overlap = device.compute_capability >= 90;
  context.num_sms = device.num_sms;
  context.shared_bytes_per_block = device.shared_bytes_per_block;
  context.hopper = device.hopper && options_.kernels != CudaBackendOptions::Kernels::kGeneric;
  const DeviceDraws::Sizes draw_sizes = {config_.vocab_size, options_.num_slots,
                                         options_.max_step_tokens};
  MMFREE_RETURN_IF_ERROR(
      CheckMemory(model, sizes, DeviceDraws::Bytes(draw_sizes, context), device));

  cudaStream_t stream = nullptr;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_ = Stream(stream);
  context.stream = stream;
  MMFREE_ASSIGN_OR_RETURN(model_, DeviceModel::Upload(model));
  MMFREE_ASSIGN_OR_RETURN(workspace_, Workspace::Create(config_, sizes));

  const auto bind_pinned = [&](std::byte* base) {
    Carver carver(base);
    host_in_ = Workspace::TakeInputs(sizes, carver);
    host_out_ = carver.Take<HeadOutput>(options_.max_step_tokens);
    host_state_ = carver.Take<float>(config_.state_floats());
    return carver.bytes();
  };
  MMFREE_ASSIGN_OR_RETURN(pinned_, PinnedBuffer::Allocate(bind_pinned(nullptr)));
  bind_pinned(pinned_.data());

  if (options_.resident_slots > 0) {
    cudaEvent_t event = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaEventCreateWithFlags(&event, static_cast<unsigned>(cudaEventDisableTiming)));
    resident_ready_ = Event(event);
    MMFREE_ASSIGN_OR_RETURN(reader_, StateReader::Create(config_.state_floats()));
  }

  MMFREE_ASSIGN_OR_RETURN(DeviceDraws draws, DeviceDraws::Create(draw_sizes, context));
  draws_ = std::make_unique<DeviceDraws>(std::move(draws));
  MMFREE_ASSIGN_OR_RETURN(
      plan_, DecodePlan::Create(config_, model_, workspace_, options_.kernels, context));
  MMFREE_ASSIGN_OR_RETURN(
      clusters_, ClusterPlan::Create(config_, model_, workspace_, options_.kernels, context));
  forward_ = std::make_unique<Forward>(config_, model_, workspace_, plan_, clusters_, context);

  info_.name = "cuda";
  info_.description =
      absl::StrCat(device.name, ", sm_", device.compute_capability, device.hopper ? "a" : "");
  info_.num_slots = options_.num_slots;
  info_.resident_slots = options_.resident_slots;
  info_.state_floats = config_.state_floats();
  info_.max_step_tokens = options_.max_step_tokens;
  info_.weight_bytes = model_.bytes();
  info_.state_bytes = Workspace::StateBytes(config_, sizes);
  return absl::OkStatus();
}

// The current device belongs to the calling thread, which may be another one each time.
absl::Status CudaBackend::UseDevice() const {
  MMFREE_CUDA_RETURN_IF_ERROR(cudaSetDevice(options_.device));
  return absl::OkStatus();
}

absl::Status CudaBackend::Wait() const {
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::CheckSlot(int32_t slot, int32_t begin, int32_t end) const {
  if (slot >= begin && slot < end) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("slot ", slot, " is outside [", begin, ", ", end, ")"));
}

absl::Status CudaBackend::CheckFloats(size_t floats) const {
  if (static_cast<int64_t>(floats) == info_.state_floats) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a state has ", info_.state_floats, " floats, got ", floats));
}

absl::Status CudaBackend::Rewind(int32_t slot, int32_t tokens) {
  MMFREE_ASSIGN_OR_RETURN(const int32_t kept, planner_.KeptState(slot, tokens));
  if (kept < 0) return absl::OkStatus();
  MMFREE_RETURN_IF_ERROR(UseDevice());
  // Ordered before the next step by the stream.
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(SlotState(slot), workspace_.kept + kept * workspace_.state_stride,
                      info_.state_floats * sizeof(float), cudaMemcpyDeviceToDevice, stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::ZeroSlot(int32_t slot) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  MMFREE_RETURN_IF_ERROR(UseDevice());
  // Ordered before the next step by the stream.
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaMemsetAsync(SlotState(slot), 0, info_.state_floats * sizeof(float), stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::CopySlot(int32_t from, int32_t to) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(from, 0, all_slots()));
  MMFREE_RETURN_IF_ERROR(CheckSlot(to, 0, all_slots()));
  if (from == to) return absl::OkStatus();
  MMFREE_RETURN_IF_ERROR(UseDevice());
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(SlotState(to), SlotState(from),
                                              info_.state_floats * sizeof(float),
                                              cudaMemcpyDeviceToDevice, stream_.get()));
  if (to >= options_.num_slots) {
    MMFREE_CUDA_RETURN_IF_ERROR(cudaEventRecord(resident_ready_.get(), stream_.get()));
  }
  return absl::OkStatus();
}

// From any thread. `resident_ready_` may have been recorded again since the slot was copied to,
// which only makes this wait for more.
absl::Status CudaBackend::ReadResident(int32_t slot, absl::Span<float> state) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot, options_.num_slots, all_slots()));
  MMFREE_RETURN_IF_ERROR(CheckFloats(state.size()));
  MMFREE_RETURN_IF_ERROR(UseDevice());
  return reader_->Read(SlotState(slot), resident_ready_.get(), state);
}

absl::Status CudaBackend::ReadSlot(int32_t slot, absl::Span<float> state) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  MMFREE_RETURN_IF_ERROR(CheckFloats(state.size()));
  MMFREE_RETURN_IF_ERROR(UseDevice());
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(host_state_, SlotState(slot),
                                              state.size() * sizeof(float), cudaMemcpyDeviceToHost,
                                              stream_.get()));
  MMFREE_RETURN_IF_ERROR(Wait());
  memcpy(state.data(), host_state_, state.size() * sizeof(float));
  return absl::OkStatus();
}

absl::Status CudaBackend::WriteSlot(int32_t slot, absl::Span<const float> state) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  MMFREE_RETURN_IF_ERROR(CheckFloats(state.size()));
  MMFREE_RETURN_IF_ERROR(UseDevice());
  memcpy(host_state_, state.data(), state.size() * sizeof(float));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(SlotState(slot), host_state_,
                                              state.size() * sizeof(float), cudaMemcpyHostToDevice,
                                              stream_.get()));
  return Wait();  // the pinned copy is reused
}

absl::StatusOr<GraphExec> CudaBackend::Capture(const GraphKey& key) const {
  const StepShape shape = {key.tokens, key.tokens, 0, key.decode};
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
  const cudaError_t error = forward_->Step(host_in_, shape, key.head ? host_out_ : nullptr);
  // Ended even after a failure, which would leave the stream capturing.
  cudaGraph_t captured = nullptr;
  const cudaError_t end = cudaStreamEndCapture(stream_.get(), &captured);
  const Graph graph(captured);
  MMFREE_RETURN_IF_ERROR(ToStatus(error, "capture of a step"));
  MMFREE_RETURN_IF_ERROR(ToStatus(end, "cudaStreamEndCapture"));
  cudaGraphExec_t exec = nullptr;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaGraphInstantiate(&exec, graph.get(), 0));
  return GraphExec(exec);
}

bool CudaBackend::WantsGraph() const {
  const bool speculative = planner_.kept_states() > 0 &&
                           planner_.short_rows() == host_in_.counts->rows &&
                           planner_.tokens() <= kMaxSpeculativeGraphTokens;
  return options_.use_graphs && (planner_.decode() || speculative) &&
         planner_.heads() <= workspace_.head_rows;
}

absl::Status CudaBackend::RunGraph() {
  const int32_t tokens = std::min(BatchBucket(planner_.tokens()), options_.max_step_tokens);
  const GraphKey key = {tokens, planner_.heads() > 0, planner_.decode()};
  auto it = graphs_.find(key);
  if (it == graphs_.end()) {
    MMFREE_ASSIGN_OR_RETURN(GraphExec exec, Capture(key));
    it = graphs_.emplace(key, std::move(exec)).first;
  }
  MMFREE_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(it->second.get(), stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::CopyHead(int32_t row, float* out) const {
  MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(out, workspace_.logits + row * workspace_.ld_vocab,
                                              config_.vocab_size * sizeof(float),
                                              cudaMemcpyDeviceToHost, stream_.get()));
  return absl::OkStatus();
}

absl::Status CudaBackend::CopyLogits(int32_t first, int32_t rows, StepOutput* out) {
  const std::vector<int32_t>& heads = planner_.logit_heads();
  const int64_t vocab = config_.vocab_size;
  for (auto it = std::lower_bound(heads.begin(), heads.end(), first);
       it != heads.end() && *it < first + rows; ++it) {
    MMFREE_RETURN_IF_ERROR(
        CopyHead(*it - first, out->logits.data() + (it - heads.begin()) * vocab));
  }
  const std::vector<StepPlanner::SamplerHead>& samplers = planner_.sampler_heads();
  for (size_t i = 0; i < host_draws_.size(); ++i) {
    const int32_t head = samplers[host_draws_[i]].head;
    if (head < first || head >= first + rows) continue;
    MMFREE_RETURN_IF_ERROR(
        CopyHead(head - first, sampler_logits_.data() + static_cast<int64_t>(i) * vocab));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::PlanDraws() {
  draws_->Begin();
  host_draws_.clear();
  const std::vector<StepPlanner::SamplerHead>& samplers = planner_.sampler_heads();
  for (size_t i = 0; i < samplers.size(); ++i) {
    const StepPlanner::SamplerHead& place = samplers[i];
    if (!draws_->Add(place.head, *place.params, place.position)) host_draws_.push_back(i);
  }
  sampler_logits_.resize(host_draws_.size() * config_.vocab_size);
  return draws_->Upload();
}

absl::Status CudaBackend::FinishHeads(int32_t first, int32_t rows, StepOutput* out) {
  MMFREE_RETURN_IF_ERROR(
      draws_->Launch(workspace_.logits, workspace_.ld_vocab, workspace_.stats, first, rows));
  return CopyLogits(first, rows, out);
}

void CudaBackend::CollectDraws(StepOutput* out) const {
  const size_t vocab = static_cast<size_t>(config_.vocab_size);
  const std::vector<StepPlanner::SamplerHead>& samplers = planner_.sampler_heads();
  size_t host = 0;
  int32_t device = 0;
  for (size_t i = 0; i < samplers.size(); ++i) {
    const StepPlanner::SamplerHead& place = samplers[i];
    SampledToken& sample =
        place.inner ? out->inner_samples[place.index] : out->samples[place.index];
    if (host == host_draws_.size() || host_draws_[host] != i) {
      sample = draws_->Result(device++);
      continue;
    }
    sample = place.params->sampler->Sample(
        absl::MakeConstSpan(sampler_logits_).subspan(host++ * vocab, vocab), *place.params,
        place.position);
  }
}

absl::Status CudaBackend::RunEager(StepOutput* out) {
  const int32_t short_rows = planner_.short_rows();
  const StepShape shape = {planner_.tokens(), short_rows, host_in_.counts->rows - short_rows,
                           planner_.decode()};
  MMFREE_CUDA_RETURN_IF_ERROR(forward_->Layers(host_in_, shape));
  MMFREE_RETURN_IF_ERROR(PlanDraws());
  for (int32_t first = 0; first < planner_.heads(); first += workspace_.head_rows) {
    const int32_t heads = std::min(workspace_.head_rows, planner_.heads() - first);
    MMFREE_CUDA_RETURN_IF_ERROR(forward_->Head(first, heads, host_out_));
    MMFREE_RETURN_IF_ERROR(FinishHeads(first, heads, out));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::Step(absl::Span<const StepRow> rows, StepOutput* out) {
  MMFREE_RETURN_IF_ERROR(planner_.Check(rows));
  planner_.Fill(rows, host_in_);
  out->logits.resize(planner_.logit_heads().size() * config_.vocab_size);
  if (!rows.empty()) {
    MMFREE_RETURN_IF_ERROR(UseDevice());
    if (planner_.banned() > 0) {
      MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace_.in.banned, host_in_.banned,
                                                  planner_.banned() * sizeof(int32_t),
                                                  cudaMemcpyHostToDevice, stream_.get()));
    }
    if (WantsGraph()) {
      MMFREE_RETURN_IF_ERROR(RunGraph());
      MMFREE_RETURN_IF_ERROR(PlanDraws());
      MMFREE_RETURN_IF_ERROR(FinishHeads(0, planner_.heads(), out));
    } else {
      MMFREE_RETURN_IF_ERROR(RunEager(out));
    }
    MMFREE_RETURN_IF_ERROR(Wait());
  }
  planner_.Collect(rows, host_out_, out);
  CollectDraws(out);
  return absl::OkStatus();
}

}  // namespace
}  // namespace cuda

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const Model& model,
                                                           const CudaBackendOptions& options) {
  return cuda::CudaBackend::Create(model, options);
}

absl::Status CheckCudaDevice(int32_t device) { return cuda::OpenDevice(device).status(); }

}  // namespace mmfree
