// What a caller asks of the scheduler and what comes back. Token ids only: text is the RPC layer's.
#ifndef MMFREE_SERVER_SCHEDULER_REQUEST_H_
#define MMFREE_SERVER_SCHEDULER_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/sampling/request_sampler.h"
#include "server/scheduler/priority.h"
#include "server/sessions/device_pool.h"

namespace mmfree {

// Names a request inside one engine; never reused, never 0.
using RequestHandle = uint64_t;

enum class FinishReason : uint8_t {
  kEos,         // the model sampled its end-of-sequence token (not emitted)
  kLength,      // max_new_tokens were emitted
  kStopToken,   // a token of stop_token_ids was sampled (not emitted)
  kStopString,  // the stop condition said so
};

// Ends a generation from what was emitted. Called by the step thread, so it must be quick.
class StopCondition {
 public:
  virtual ~StopCondition() = default;
  // The next token was emitted. True: the output is complete with it; not called again then.
  virtual bool Append(int32_t token) = 0;
  // The output ends for another reason. True: its end completes what it is to stop at, which is the
  // reason then.
  virtual bool Finish() { return false; }
  // So many of the first tokens that were given are part of the context wherever in the others the
  // output ends; it does not fall. Asked after each token of requests with a final_state.
  virtual int64_t settled() const { return 0; }
  // One that goes on from here by itself.
  virtual std::unique_ptr<StopCondition> Clone() const = 0;
};

// Where a generation leaves its context, for a caller that goes on from it later. The context is
// what came before, the prompt, and the emitted tokens.
struct FinalState {
  std::vector<float> state;  // [state_floats], after `fed` tokens; empty with `device`
  // Instead of `state`, with final_on_device, when there was room: where a copy of it is.
  std::shared_ptr<const DevicePlace> device;
  int64_t fed = 0;  // tokens of the prompt and then of the output that `state` has
  // Emitted tokens after those, or the prompt's last one: at most one, except with kStopString.
  // Then it is all since a place that was settled, and the stop condition's owner knows how many of
  // them are part of the context.
  std::vector<int32_t> pending;
  // The last emitted tokens, pending ones included, oldest first: kMaxFinalTokens that were fed,
  // when there were so many.
  std::vector<int32_t> emitted;
};
inline constexpr size_t kMaxFinalTokens = 1024;

// Already validated by the caller (rpc/validation): the scheduler only checks what would harm
// others (token ids in range, at most kMaxBannedTokens ids that end it).
struct GenerationRequest {
  std::string request_id;
  std::vector<int32_t> prompt;  // at least one token
  SamplingParams sampling;      // `banned` and `sampler` are the scheduler's to set
  // Draws the tokens where `sampling` alone does not say how; null: the backend's own sampling.
  std::shared_ptr<RequestSampler> sampler;
  int64_t max_new_tokens = 0;  // 0: only feed the prompt; finishes with kLength
  int64_t min_new_tokens = 0;  // EOS and stop tokens are not sampled before this many were emitted
  std::vector<int32_t> eos_token_ids;  // empty: ignore_eos
  std::vector<int32_t> stop_token_ids;
  std::shared_ptr<StopCondition> stop_condition;  // null: none
  bool prompt_logprobs = false;                   // GenerationSink::OnPromptLogprobs
  // With prompt_logprobs: so many likeliest alternatives for each.
  int prompt_top_logprobs = 0;
  // Proposals to verify in one step; 0: none. Without effect on the output. They are looked up in
  // lookup_context, the prompt and the output.
  int32_t speculative_tokens = 0;
  std::vector<int32_t> lookup_context;
  // What came before the prompt: how many tokens, and the state [state_floats] after them. Null:
  // the state before any token.
  uint64_t first_position = 0;
  std::shared_ptr<const std::vector<float>> initial_state;
  // The same on a device, instead of initial_state. On another device than this engine's it is read
  // in Submit, which then blocks.
  std::shared_ptr<const DevicePlace> device_state;
  // Filled in before the sink is told of a clean end, and not touched afterwards. Null: not wanted.
  // With max_new_tokens = 0 the prompt's last token is left pending.
  std::shared_ptr<FinalState> final_state;
  // final_state's owner can take its state from the device, so that no step waits for it.
  bool final_on_device = false;
  Priority priority = Priority::kNormal;
  std::string caller;      // whose share of the service it counts against; any text
  std::string cache_salt;  // prefixes are shared with requests of this caller and salt only
  absl::Time deadline = absl::InfiniteFuture();
};

struct ScoreRequest {
  std::string request_id;
  std::vector<int32_t> tokens;  // at least one token
  bool last_logits = false;
  Priority priority = Priority::kNormal;
  std::string caller;  // as above
  absl::Time deadline = absl::InfiniteFuture();
};

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;      // of the prompt, not computed again
  int64_t completion_tokens = 0;  // emitted
};

struct Timings {
  absl::Duration queued;   // from submission to the first step that had the request
  absl::Duration prefill;  // from there to the first sampled token
  absl::Duration decode;   // from there to the last
};

struct GenerationResult {
  FinishReason reason = FinishReason::kLength;
  int32_t matched_stop_token = -1;  // kStopToken, kEos
  Usage usage;
  Timings timings;
};

struct ScoreResult {
  std::vector<float> logprobs;     // [tokens - 1]: of token i+1 given those before it
  std::vector<int32_t> argmax;     // [tokens]: likeliest token after token i
  std::vector<float> last_logits;  // [vocab_size] when asked for
  Timings timings;
};

// Receives one generation. The scheduler calls it from a delivery thread, never from the step
// thread and never concurrently for one request: OnTokens any number of times, then OnFinished
// exactly once. Implementations must not block: they hand over and return.
class GenerationSink {
 public:
  virtual ~GenerationSink() = default;

  // Natural logarithms of the probabilities, at temperature 1, of the prompt's tokens but the
  // first, and the alternatives to each of these (`top` is empty when none were asked for). Once,
  // before the first token, when they were asked for.
  virtual void OnPromptLogprobs(absl::Span<const float> /*logprobs*/,
                                absl::Span<const TokenAlternatives> /*top*/) {}

  // Newly emitted tokens, in order; at least one.
  virtual void OnTokens(absl::Span<const SampledToken> tokens) = 0;

  // CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE (draining) or INTERNAL (device fault) when not OK.
  virtual void OnFinished(const absl::StatusOr<GenerationResult>& result) = 0;

  // Tokens received that the client has not taken yet. Thread-safe; the step thread pauses the
  // request's row while this is above its limit.
  virtual size_t backlog() const = 0;
};

class ScoreSink {
 public:
  virtual ~ScoreSink() = default;
  // Called once, from a delivery thread. Errors as GenerationSink::OnFinished.
  virtual void OnScored(absl::StatusOr<ScoreResult> result) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_REQUEST_H_
