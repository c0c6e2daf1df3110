#include "server/backends/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/backends/cpu/forward.h"
#include "server/backends/cpu/kernel_choice.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/backends/cpu/topology.h"
#include "server/backends/cpu/weights.h"
#include "server/base/cpu_features.h"
#include "server/base/status_macros.h"
#include "server/model/region.h"

namespace mmfree {
namespace {

// Tokens that go through the layers together: enough to use each weight many times while it is in
// a cache, few enough that the activations stay in one, too.
constexpr int32_t kChunkTokens = 256;

constexpr int32_t kMaxThreads = 1024;
constexpr int32_t kMaxSlots = 1 << 20;
constexpr int32_t kMaxStepTokens = 1 << 20;
// A product's largest 32-bit sum is 128 (activation) * 128 (code 2 at bits 6-7) a column.
constexpr int64_t kMaxColumns = 131072;

absl::Status CheckRange(absl::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("cpu backend: ", name, "=", value, ": expected ", low, " to ", high));
}

// The nodes that threads and weights are kept to.
std::vector<cpu::Processors> Nodes(const CpuBackendOptions& options) {
  if (!options.numa) return {cpu::AllowedProcessors()};
  if (!options.numa_nodes.empty()) return options.numa_nodes;
  return cpu::NumaNodes(cpu::AllowedProcessors());
}

int64_t WeightBytes(const Model& model) {
  const ModelConfig& config = model.config();
  const int64_t element = model.embedding().dtype == DType::kF32 ? 4 : 2;
  // Per layer nine vectors of the hidden size and one of the intermediate size.
  const int64_t vectors = config.num_layers * (9 * config.hidden_size + config.intermediate_size) +
                          2 * config.hidden_size;
  return model.ternary_bytes() + config.vocab_size * config.hidden_size * element +
         vectors * static_cast<int64_t>(sizeof(float));
}

class CpuBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(std::shared_ptr<const Model> model,
                                                         const CpuBackendOptions& options);

  const BackendInfo& info() const override { return info_; }
  absl::Status Step(absl::Span<const StepRow> rows, StepOutput* out) override;
  absl::Status Rewind(int32_t slot, int32_t tokens) override;
  absl::Status ZeroSlot(int32_t slot) override;
  absl::Status CopySlot(int32_t from, int32_t to) override;
  absl::Status ReadSlot(int32_t slot, absl::Span<float> state) override;
  absl::Status WriteSlot(int32_t slot, absl::Span<const float> state) override;

 private:
  // A rewindable row: the states after its tokens but the last are at `first`,
  // [tokens - 1, state_floats].
  struct KeptRow {
    int32_t slot;
    int32_t tokens;
    float* first;
  };

  CpuBackend(std::shared_ptr<const Model> model, std::vector<cpu::Processors> homes)
      : model_(std::move(model)), pool_(std::move(homes)) {}

  absl::Status CheckSlot(int32_t slot) const;
  absl::Status CheckStateSize(size_t floats) const;
  absl::Status CheckRows(absl::Span<const StepRow> rows);
  absl::Status CheckRow(const StepRow& row, absl::string_view name) const;
  absl::Status CheckSampling(const SamplingParams& sampling, absl::string_view name) const;
  void PrepareOutput(absl::Span<const StepRow> rows, StepOutput* out);
  void AddToken(const StepRow& row, size_t t);
  void AddOutput(const StepRow& row, size_t t, SampledToken* sample);
  void RunChunk();
  // The state after `fed` tokens of the row, at least one and not all; with all: where the next
  // row's begin.
  float* KeptState(const KeptRow& row, int32_t fed) const {
    return row.first + (fed - 1) * info_.state_floats;
  }
  float* Slot(int32_t slot) { return states_data_ + slot * info_.state_floats; }
  size_t state_bytes() const { return static_cast<size_t>(info_.state_floats) * sizeof(float); }

  const std::shared_ptr<const Model> model_;
  cpu::ThreadPool pool_;
  std::unique_ptr<cpu::Forward> forward_;
  BackendInfo info_;
  Region states_;  // [num_slots, num_layers, hidden_size]
  float* states_data_ = nullptr;

  // Reused between steps.
  std::vector<uint64_t> last_step_;  // of each slot: the step that used it last
  uint64_t step_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<cpu::Segment> segments_;
  std::vector<cpu::OutputPosition> outputs_;
  // Where the next outputs of a step go.
  SampledToken* next_inner_ = nullptr;
  TokenScore* next_score_ = nullptr;
  float* next_logits_ = nullptr;

  std::vector<KeptRow> kept_rows_;  // of the last step
  std::vector<float> kept_states_;
};

absl::StatusOr<std::unique_ptr<Backend>> CpuBackend::Create(std::shared_ptr<const Model> model,
                                                            const CpuBackendOptions& options) {
  MMFREE_RETURN_IF_ERROR(CheckRange("threads", options.threads, 0, kMaxThreads));
  MMFREE_RETURN_IF_ERROR(CheckRange("num_slots", options.num_slots, 1, kMaxSlots));
  MMFREE_RETURN_IF_ERROR(CheckRange("max_step_tokens", options.max_step_tokens, 1, kMaxStepTokens));
  const ModelConfig& config = model->config();
  MMFREE_RETURN_IF_ERROR(CheckRange("hidden_size", config.hidden_size, 1, kMaxColumns));
  MMFREE_RETURN_IF_ERROR(CheckRange("intermediate_size", config.intermediate_size, 1, kMaxColumns));
  MMFREE_ASSIGN_OR_RETURN(const CpuIsa isa, SelectCpuIsa(options.isa));
  const int threads = options.threads > 0 ? options.threads : cpu::AvailablePhysicalCores();

  const std::vector<cpu::Processors> nodes = Nodes(options);
  std::unique_ptr<CpuBackend> backend;
  try {
    backend.reset(
        new CpuBackend(std::move(model), cpu::ThreadHomes(nodes, threads, options.pin_threads)));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot start ", threads, " threads: ", error.what(), "; lower --threads"));
  }
  BackendInfo& info = backend->info_;
  info.name = "cpu";
  info.description =
      absl::StrCat(CpuIsaName(isa), ", ", threads, threads == 1 ? " thread" : " threads");
  if (nodes.size() > 1) absl::StrAppend(&info.description, " on ", nodes.size(), " NUMA nodes");
  info.num_slots = options.num_slots;
  info.state_floats = config.state_floats();
  info.max_step_tokens = options.max_step_tokens;
  info.weight_bytes = WeightBytes(*backend->model_);
  info.state_bytes = info.num_slots * info.state_floats * static_cast<int64_t>(sizeof(float));
  MMFREE_ASSIGN_OR_RETURN(backend->states_, Region::Allocate(info.state_bytes));
  backend->states_data_ = reinterpret_cast<float*>(backend->states_.mutable_data());
  backend->last_step_.resize(options.num_slots);
  cpu::Weights weights = cpu::ViewWeights(*backend->model_);
  if (nodes.size() > 1) {
    MMFREE_ASSIGN_OR_RETURN(weights, cpu::PlaceWeights(*backend->model_, &backend->pool_));
  }
  MMFREE_ASSIGN_OR_RETURN(
      backend->forward_,
      cpu::Forward::Create(backend->model_.get(), std::move(weights), &cpu::KernelsFor(isa),
                           &backend->pool_, std::min(kChunkTokens, options.max_step_tokens)));
  return backend;
}

absl::Status CpuBackend::CheckSlot(int32_t slot) const {
  if (slot >= 0 && slot < info_.num_slots) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("slot ", slot, " is out of range: there are ", info_.num_slots, " slots"));
}

absl::Status CpuBackend::CheckStateSize(size_t floats) const {
  if (floats == static_cast<size_t>(info_.state_floats)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a state has ", info_.state_floats, " floats, got ", floats));
}

absl::Status CpuBackend::CheckSampling(const SamplingParams& sampling,
                                       absl::string_view name) const {
  if (!(sampling.temperature >= 0.0f) || std::isinf(sampling.temperature)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": temperature ", sampling.temperature,
                                                   ": expected a finite value >= 0"));
  }
  const int64_t vocab = model_->config().vocab_size;
  if (sampling.banned.size() > kMaxBannedTokens) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", sampling.banned.size(),
                                                   " banned tokens: at most ", kMaxBannedTokens));
  }
  int64_t distinct = 0;
  for (size_t i = 0; i < sampling.banned.size(); ++i) {
    const int32_t token = sampling.banned[i];
    if (token < 0 || token >= vocab) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, ": banned token ", token, " is out of range: the vocabulary has ", vocab));
    }
    const auto before = sampling.banned.begin() + static_cast<ptrdiff_t>(i);
    if (std::find(sampling.banned.begin(), before, token) == before) ++distinct;
  }
  if (distinct == vocab) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": the whole vocabulary is banned"));
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::CheckRow(const StepRow& row, absl::string_view name) const {
  const int64_t vocab = model_->config().vocab_size;
  if (row.tokens.empty()) return absl::InvalidArgumentError(absl::StrCat(name, ": no tokens"));
  for (int32_t token : row.tokens) {
    if (token >= 0 && token < vocab) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": token ", token, " is out of range: the vocabulary has ", vocab));
  }
  if (!row.targets.empty() && row.targets.size() != row.tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", row.targets.size(), " targets for ",
                                                   row.tokens.size(), " tokens"));
  }
  for (int32_t target : row.targets) {
    if (target >= -1 && target < vocab) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": target ", target, " is out of range: the vocabulary has ", vocab));
  }
  if (!row.inner.empty() && row.inner.size() + 1 != row.tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": ", row.inner.size(), " inner samples for ", row.tokens.size(), " tokens"));
  }
  for (const SamplingParams& sampling : row.inner) {
    MMFREE_RETURN_IF_ERROR(CheckSampling(sampling, name));
  }
  return row.sampling == nullptr ? absl::OkStatus() : CheckSampling(*row.sampling, name);
}

absl::Status CpuBackend::CheckRows(absl::Span<const StepRow> rows) {
  ++step_;
  int64_t tokens = 0;
  int64_t kept = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string name = absl::StrCat("row ", i);
    if (absl::Status status = CheckSlot(rows[i].slot); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", status.message()));
    }
    if (std::exchange(last_step_[rows[i].slot], step_) == step_) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": slot ", rows[i].slot, " is used by two rows"));
    }
    MMFREE_RETURN_IF_ERROR(CheckRow(rows[i], name));
    tokens += static_cast<int64_t>(rows[i].tokens.size());
    if (rows[i].rewindable) kept += static_cast<int64_t>(rows[i].tokens.size()) - 1;
  }
  if (tokens > info_.max_step_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(tokens, " tokens in a step: at most ", info_.max_step_tokens));
  }
  if (kept > kMaxKeptStates) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rewindable rows would keep ", kept, " states, at most ", kMaxKeptStates, " are allowed"));
  }
  return absl::OkStatus();
}

void CpuBackend::PrepareOutput(absl::Span<const StepRow> rows, StepOutput* out) {
  size_t inner = 0;
  size_t scores = 0;
  size_t positions = 0;
  size_t kept = 0;
  for (const StepRow& row : rows) {
    inner += row.inner.size();
    scores += row.targets.size();
    if (row.rewindable) kept += row.tokens.size() - 1;
    if (row.logits == LogitsMode::kLast) ++positions;
    if (row.logits == LogitsMode::kAll) positions += row.tokens.size();
  }
  out->samples.assign(rows.size(), SampledToken());
  out->inner_samples.assign(inner, SampledToken());
  out->scores.assign(scores, TokenScore());
  out->logits.resize(positions * static_cast<size_t>(model_->config().vocab_size));
  next_inner_ = out->inner_samples.data();
  next_score_ = out->scores.data();
  next_logits_ = out->logits.data();
  kept_rows_.clear();
  const size_t kept_floats = kept * static_cast<size_t>(info_.state_floats);
  if (kept_states_.size() < kept_floats) kept_states_.resize(kept_floats);
}

absl::Status CpuBackend::Step(absl::Span<const StepRow> rows, StepOutput* out) {
  MMFREE_RETURN_IF_ERROR(CheckRows(rows));
  PrepareOutput(rows, out);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t t = 0; t < rows[i].tokens.size(); ++t) {
      AddToken(rows[i], t);
      AddOutput(rows[i], t, &out->samples[i]);
      if (static_cast<int32_t>(tokens_.size()) == forward_->max_tokens()) RunChunk();
    }
  }
  if (!tokens_.empty()) RunChunk();
  return absl::OkStatus();
}

// Appends the row's token `t` to the chunk.
void CpuBackend::AddToken(const StepRow& row, size_t t) {
  const int32_t index = static_cast<int32_t>(tokens_.size());
  float* const slot = Slot(row.slot);
  if (!row.rewindable) {
    if (t == 0 || index == 0) segments_.push_back({slot, index, 0, nullptr});
    ++segments_.back().count;
  } else {
    // Each token goes on from a copy of the state before it; the last one's is the slot's again.
    if (t == 0) {
      float* const first = kept_rows_.empty()
                               ? kept_states_.data()
                               : KeptState(kept_rows_.back(), kept_rows_.back().tokens);
      kept_rows_.push_back({row.slot, static_cast<int32_t>(row.tokens.size()), first});
    }
    const KeptRow& kept = kept_rows_.back();
    const int32_t fed = static_cast<int32_t>(t);
    float* const before = t == 0 ? slot : KeptState(kept, fed);
    float* const after = fed + 1 == kept.tokens ? slot : KeptState(kept, fed + 1);
    segments_.push_back({after, index, 1, before == after ? nullptr : before});
  }
  tokens_.push_back(row.tokens[t]);
}

// What is asked for after the row's token `t`, which was just added. `sample`: the row's.
void CpuBackend::AddOutput(const StepRow& row, size_t t, SampledToken* sample) {
  const bool last = t + 1 == row.tokens.size();
  cpu::OutputPosition output = {};
  output.token = static_cast<int32_t>(tokens_.size()) - 1;
  output.sample_position = row.position + t + 1;
  if (last && row.sampling != nullptr) {
    output.sampling = row.sampling;
    output.sample = sample;
  } else if (!last && !row.inner.empty()) {
    output.sampling = &row.inner[t];
    output.sample = next_inner_++;
  }
  if (!row.targets.empty()) {
    output.target = row.targets[t];
    output.score = next_score_++;
  }
  if (row.logits == LogitsMode::kAll || (last && row.logits == LogitsMode::kLast)) {
    output.logits = next_logits_;
    next_logits_ += model_->config().vocab_size;
  }
  if (output.sample != nullptr || output.score != nullptr || output.logits != nullptr) {
    outputs_.push_back(output);
  }
}

// Runs what Step has gathered and starts the next chunk.
void CpuBackend::RunChunk() {
  forward_->Run({tokens_, segments_, outputs_});
  tokens_.clear();
  segments_.clear();
  outputs_.clear();
}

absl::Status CpuBackend::Rewind(int32_t slot, int32_t tokens) {
  for (const KeptRow& row : kept_rows_) {
    if (row.slot != slot) continue;
    if (tokens < 1 || tokens > row.tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("rewind to ", tokens, " of a row's ", row.tokens, " tokens"));
    }
    if (tokens < row.tokens) memcpy(Slot(slot), KeptState(row, tokens), state_bytes());
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("slot ", slot, " had no rewindable row in the last step"));
}

absl::Status CpuBackend::ZeroSlot(int32_t slot) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  std::fill_n(Slot(slot), info_.state_floats, 0.0f);
  return absl::OkStatus();
}

absl::Status CpuBackend::CopySlot(int32_t from, int32_t to) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(from));
  MMFREE_RETURN_IF_ERROR(CheckSlot(to));
  if (from != to) memcpy(Slot(to), Slot(from), state_bytes());
  return absl::OkStatus();
}

absl::Status CpuBackend::ReadSlot(int32_t slot, absl::Span<float> state) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  MMFREE_RETURN_IF_ERROR(CheckStateSize(state.size()));
  memcpy(state.data(), Slot(slot), state_bytes());
  return absl::OkStatus();
}

absl::Status CpuBackend::WriteSlot(int32_t slot, absl::Span<const float> state) {
  MMFREE_RETURN_IF_ERROR(CheckSlot(slot));
  MMFREE_RETURN_IF_ERROR(CheckStateSize(state.size()));
  memcpy(Slot(slot), state.data(), state_bytes());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(std::shared_ptr<const Model> model,
                                                          const CpuBackendOptions& options) {
  return CpuBackend::Create(std::move(model), options);
}

}  // namespace mmfree
