// Everything the scheduler keeps of one request, grouped by the thread that may touch it.
#ifndef MMFREE_SERVER_SCHEDULER_REQUEST_STATE_H_
#define MMFREE_SERVER_SCHEDULER_REQUEST_STATE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/backends/backend.h"
#include "server/prefix_cache/prefix_cache.h"
#include "server/scheduler/policy.h"
#include "server/scheduler/queued_prompts.h"
#include "server/scheduler/request.h"
#include "server/scheduler/speculation.h"

namespace mmfree {

struct RequestState;

// What PrefixSharing keeps of a request. The step thread's, but for what is constant.
struct PrefixState {
  std::string space;                   // constant once submitted; empty: takes no part
  int64_t expected = 0;                // tokens that were cached when it was submitted; constant
  std::vector<int64_t> checkpoints;    // where its state is to be kept; falling, the next one last
  bool feeding = false;                // others may wait for it
  std::vector<RequestState*> joiners;  // those that do
  RequestState* joined = nullptr;      // whom it waits for itself, while held
  int64_t join_at = 0;                 // until that one has fed so many tokens
  bool has_joined = false;
  // What it was released with, until it is prepared.
  SharedState joined_state;
  int64_t joined_tokens = 0;
};

// Made by the submitter, handed to the step thread through the inbox, and by the step thread with
// the request's last event to the request's delivery thread, which destroys it.
struct RequestState : SchedulerEntry {
  // Constant once submitted. Exactly one of the sinks is set.
  std::shared_ptr<GenerationSink> generation_sink;
  std::shared_ptr<ScoreSink> score_sink;
  int64_t max_new_tokens = 0;
  int64_t min_new_tokens = 0;
  bool last_logits = false;
  bool prompt_logprobs = false;  // of a generation: score.logprobs
  // Draws nothing, but lists the alternatives in the prompt; null: not wanted.
  std::unique_ptr<RequestSampler> prompt_sampler;
  size_t num_eos = 0;
  std::vector<int32_t> end_tokens;  // num_eos EOS ids, then the stop ids
  absl::Time submitted;
  uint64_t first_position = 0;  // of tokens[0] in the context
  // The state before tokens[fed] when its first step comes; null: before any token. Let go once it
  // is in the slot.
  SharedState initial_state;
  std::shared_ptr<const DevicePlace> device_state;  // likewise, on this loop's device; or null
  std::shared_ptr<FinalState> final_state;          // filled by the step thread; null: not wanted

  PrefixState prefix;

  bool final_on_device = false;  // as GenerationRequest's

  // What FinalState is read at while the prompt is fed; 0: not then.
  int64_t final_boundary() const {
    return final_state != nullptr && max_new_tokens == 0 ? prompt_tokens - 1 : 0;
  }

  // What it counts as among the prompts that wait to be fed.
  QueuedPrompts::Prompt queued_prompt() const {
    return {prefix.space, absl::MakeConstSpan(tokens).first(static_cast<size_t>(prompt_tokens)),
            prefix.expected};
  }

  // The step thread's.
  bool state_in_slot = false;   // the slot it holds has its state
  std::vector<int32_t> tokens;  // the prompt, or the scored tokens followed by -1
  SamplingParams sampling;
  std::shared_ptr<RequestSampler> sampler;        // may be null
  std::shared_ptr<StopCondition> stop_condition;  // may be null
  std::unique_ptr<Speculation> speculation;       // may be null
  int32_t row_kept = 0;                           // tokens of a rewindable row that count; 0: all
  std::vector<SamplingParams> chunk_sampling;     // with prompt_sampler: of a chunk's tokens
  int32_t last_token = -1;                        // sampled, to be fed next
  absl::Status read_status;                       // of reading the slot into final_state
  int64_t emitted = 0;
  int64_t tokens_left = 0;  // that it may still take: of the prompt, and new ones
  // Steps that it takes once its prompt is fed: at most, and from its first one on as expected.
  int64_t expected_steps = 1;
  int64_t open_steps = 0;  // of these, those that it may end without; none from its first one on
  // Among the work ahead (work_ahead.h): as what, and the tokens of its prompt.
  enum class Counted : uint8_t { kNot, kWaiting, kRunning };
  Counted counted = Counted::kNot;
  int64_t counted_prompt = 0;
  std::vector<float> saved_state;   // while preempted or parked, [state_floats]
  int64_t least_backlog = 0;        // since it was paused: falls while the client reads
  absl::Time last_read;             // when that was seen to fall
  int64_t until_backlog_check = 0;  // tokens that can be emitted before the backlog can be too long
  absl::Time first_step;            // start of the first step that had it
  absl::Time first_token = absl::InfinitePast();
  absl::Time latest_token = absl::InfinitePast();

  // Written by the step thread before the last event, then the delivery thread's. `generation` or
  // `score` is the result when `status` is OK.
  absl::Status status;
  GenerationResult generation;
  ScoreResult score;
  std::vector<TokenAlternatives> prompt_top;  // as score.logprobs, with prompt_sampler

  // The delivery thread's, on another cache line than what the step thread writes at each token.
  alignas(64) std::vector<SampledToken> undelivered;
  bool ended = false;
  bool prompt_delivered = false;
  // Tokens the sink has been given; the step thread reads it now and then.
  std::atomic<int64_t> delivered{0};
};

// Whether a generation may emit less than it is allowed.
inline bool MayEndEarly(const RequestState& request) {
  return !request.end_tokens.empty() || request.stop_condition != nullptr;
}

inline RequestState* StateOf(SchedulerEntry* entry) { return static_cast<RequestState*>(entry); }

// Wall clocks step back now and then.
inline absl::Duration Elapsed(absl::Time from, absl::Time to) {
  return std::max(to - from, absl::ZeroDuration());
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_REQUEST_STATE_H_
