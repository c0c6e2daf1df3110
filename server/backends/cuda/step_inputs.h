// Turns the rows of a step into the device's inputs, and its outputs into a StepOutput.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_STEP_INPUTS_H_
#define MMFREE_SERVER_BACKENDS_CUDA_STEP_INPUTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/backends/cuda/layout.h"

namespace mmfree::cuda {

// Checks steps and lays them out. Keeps scratch between steps; not thread-safe.
class StepPlanner {
 public:
  StepPlanner(int32_t num_slots, int32_t max_step_tokens, int64_t vocab_size)
      : max_step_tokens_(max_step_tokens), vocab_size_(vocab_size), last_use_(num_slots, 0) {}

  // INVALID_ARGUMENT names the row and what is wrong with it; then nothing is written.
  absl::Status Check(absl::Span<const StepRow> rows);

  // Writes the inputs of checked rows. `in` has room for max_step_tokens tokens.
  void Fill(absl::Span<const StepRow> rows, const StepInputs& in);

  int32_t tokens() const { return tokens_; }
  int32_t heads() const { return heads_; }
  int32_t banned() const { return banned_; }
  int32_t short_rows() const { return short_rows_; }
  bool decode() const { return decode_; }
  // States that rewindable rows keep.
  int32_t kept_states() const { return kept_states_; }
  // Heads whose logits go back to the host, ascending.
  const std::vector<int32_t>& logit_heads() const { return logit_heads_; }

  // A place whose token a TokenSampler draws, from the logits of this head.
  struct SamplerHead {
    int32_t head = 0;
    const SamplingParams* params = nullptr;
    uint64_t position = 0;
    // It is StepOutput's inner_samples[index], otherwise samples[index].
    bool inner = false;
    size_t index = 0;
  };
  // By rising head.
  const std::vector<SamplerHead>& sampler_heads() const { return sampler_heads_; }

  // Where the state after `tokens` of the tokens of the slot's rewindable row is kept; -1: it is
  // the slot's own. INVALID_ARGUMENT: the rows filled last have no such row or place.
  absl::StatusOr<int32_t> KeptState(int32_t slot, int32_t tokens) const;

  // Scatters the heads' outputs; the samples of sampler_heads() are the caller's to draw. Resizes
  // out->logits for logit_heads(), which the caller copies.
  void Collect(absl::Span<const StepRow> rows, const HeadOutput* heads, StepOutput* out) const;

 private:
  struct KeptRow {
    int32_t slot;
    int32_t tokens;
    int32_t first;  // where the state after its first token is kept
  };

  absl::Status CheckRow(const StepRow& row);
  int32_t KeepStates(const StepRow& row);
  void FillSampling(const SamplingParams& params, const StepInputs& in, HeadInput* head);

  const int32_t max_step_tokens_;
  const int64_t vocab_size_;
  std::vector<uint64_t> last_use_;  // by slot: the step that used it
  uint64_t step_ = 0;

  int32_t tokens_ = 0;
  int32_t heads_ = 0;
  int32_t banned_ = 0;
  int32_t short_rows_ = 0;
  bool decode_ = false;
  int32_t kept_states_ = 0;
  std::vector<KeptRow> kept_rows_;
  std::vector<int32_t> logit_heads_;
  std::vector<SamplerHead> sampler_heads_;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_STEP_INPUTS_H_
