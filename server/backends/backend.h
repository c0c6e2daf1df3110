// What the step loop needs from a device: load happens in the concrete backend's Create; here are
// the state slots and the step. One virtual call per step.
#ifndef MMFREE_SERVER_BACKENDS_BACKEND_H_
#define MMFREE_SERVER_BACKENDS_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace mmfree {

struct SamplingParams;
struct SampledToken;
struct TokenDraw;

// Draws a row's token where SamplingParams alone do not say how: filters, penalties, constraints,
// alternatives (server/sampling/request_sampler.h). A backend calls Sample, or makes the draw that
// Describe describes by itself; the bytes are the same.
class TokenSampler {
 public:
  virtual ~TokenSampler() = default;

  // Draws the token at context position `position` after `logits` [vocab_size]; SampledToken::token
  // is -1 when nothing is left to choose from. Called by any of the backend's threads, concurrently
  // for different places of a step.
  virtual SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                              uint64_t position) = 0;

  // The draw that Sample would make at any position, as data (server/sampling/token_draw.h). False:
  // only Sample can make it. May take milliseconds. Threads: as Sample.
  virtual bool Describe(const SamplingParams& /*params*/, TokenDraw* /*draw*/) const {
    return false;
  }
};

// How the token after a row's last token is drawn. Same bytes on every backend (server/sampling).
struct SamplingParams {
  // 0: greedy (the likeliest token, ties to the lowest id). Otherwise > 0 and finite.
  float temperature = 0.0f;
  // Key of the counter-based generator; the draw is a function of (seed, position, candidate).
  uint64_t seed = 0;
  uint32_t candidate = 0;
  // Ids that must not be drawn: at most kMaxBannedTokens, each in [0, vocab_size), fewer than the
  // vocabulary; repeats are harmless. SampledToken::logprob stays the model's own. Must outlive
  // Step.
  absl::Span<const int32_t> banned;
  // When set, it draws the token, with the values above. Must outlive Step.
  TokenSampler* sampler = nullptr;
};

// Ids that one row can ban; more is INVALID_ARGUMENT.
inline constexpr int kMaxBannedTokens = 64;

// Tokens of a step's rewindable rows but the last one of each, at most; more is INVALID_ARGUMENT.
inline constexpr int kMaxKeptStates = 128;

// Which logits a row copies back to the host.
enum class LogitsMode : uint8_t {
  kNone,
  kLast,  // after the row's last token
  kAll,   // after each of its tokens
};

// Consecutive tokens of one sequence: one token of a decoding sequence, or a chunk of a prompt.
struct StepRow {
  int32_t slot = 0;
  // At least one token, each in [0, vocab_size). Fed in order, updating the slot's state.
  absl::Span<const int32_t> tokens;
  // Index in the context of tokens[0]; the sampled token's position is position + tokens.size().
  uint64_t position = 0;
  // Samples the next token after the last one; null: no sampling. Must outlive Step.
  const SamplingParams* sampling = nullptr;
  // Empty, or one fewer than tokens: also samples after each token but the last, inner[i] after
  // tokens[i]. Must outlive Step.
  absl::Span<const SamplingParams> inner;
  // Keeps the states after each of its tokens for Rewind.
  bool rewindable = false;
  // Empty, or as many as tokens: scores targets[i] as the token after tokens[i]. -1: only the
  // argmax.
  absl::Span<const int32_t> targets;
  LogitsMode logits = LogitsMode::kNone;
};

struct TokenAlternative {
  int32_t token = -1;
  float logprob = 0.0f;
};

using TokenAlternatives = std::shared_ptr<const std::vector<TokenAlternative>>;

struct SampledToken {
  int32_t token = -1;  // -1 for a row without sampling
  // Natural log of its probability: at temperature 1, nothing banned, unless a TokenSampler says
  // otherwise.
  float logprob = 0.0f;
  // The likeliest tokens at its place, likeliest first, when a TokenSampler was asked for them.
  TokenAlternatives top = nullptr;
};

struct TokenScore {
  float logprob = 0.0f;  // of the target; 0 when the target is -1
  int32_t argmax = -1;   // likeliest token at this position, ties to the lowest id
};

// Reused between steps, so that a steady decode loop allocates nothing.
struct StepOutput {
  std::vector<SampledToken> samples;        // [rows]
  std::vector<SampledToken> inner_samples;  // concatenated over the rows that have `inner`
  std::vector<TokenScore> scores;           // concatenated over the rows that have targets
  std::vector<float> logits;                // [positions asked for, vocab_size], in row order
};

struct BackendInfo {
  std::string name;         // "cpu" or "cuda"
  std::string description;  // e.g. "avx512, 2 threads" or "NVIDIA H200, sm_90a"
  int32_t num_slots = 0;
  // Further slots, numbered from num_slots on, that hold states at rest: CopySlot takes them,
  // ReadResident reads them, and rows cannot use them.
  int32_t resident_slots = 0;
  int64_t state_floats = 0;     // per slot: num_layers * hidden_size
  int32_t max_step_tokens = 0;  // summed over a step's rows
  int64_t weight_bytes = 0;     // on the device
  int64_t state_bytes = 0;      // all slots, resident ones included
};

// Threading: calls are serialized by the caller (the step thread owns the backend). Errors: a call
// with bad arguments (slot out of range or used by two rows, token id out of range, too many
// tokens) returns INVALID_ARGUMENT and changes nothing. Any other failure of Step is a fault of the
// device (INTERNAL): the states of the slots in that step are then undefined.
class Backend {
 public:
  virtual ~Backend() = default;

  // Constant over the backend's life; safe from any thread.
  virtual const BackendInfo& info() const = 0;

  // Feeds every row and fills `out`. All rows advance together; the result of a row does not depend
  // on the others. Blocks until the outputs are on the host.
  virtual absl::Status Step(absl::Span<const StepRow> rows, StepOutput* out) = 0;

  // Takes the slot of a rewindable row of the last Step back to the state after `tokens` of that
  // row's tokens, at least one. Only until the next Step.
  virtual absl::Status Rewind(int32_t slot, int32_t tokens) = 0;

  // Sets a slot to the state before any token. Every slot starts so.
  virtual absl::Status ZeroSlot(int32_t slot) = 0;
  // Does not wait on a device: what the caller does next comes after it.
  virtual absl::Status CopySlot(int32_t from, int32_t to) = 0;
  // The state, [num_layers, hidden_size] fp32, exactly.
  virtual absl::Status ReadSlot(int32_t slot, absl::Span<float> state) = 0;
  virtual absl::Status WriteSlot(int32_t slot, absl::Span<const float> state) = 0;

  // Reads the state that was last copied to a resident slot. Unlike every other call from any
  // thread, at any time after that copy was asked for, several at once; it holds up no step.
  // Nothing may be copied to the slot meanwhile.
  virtual absl::Status ReadResident(int32_t /*slot*/, absl::Span<float> /*state*/) {
    return absl::UnimplementedError("this backend has no resident slots");
  }
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BACKENDS_BACKEND_H_
