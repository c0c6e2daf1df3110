// The ends of requests: the step thread.
#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

absl::string_view ReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStopToken:
      return "stop_token";
    case FinishReason::kStopString:
      return "stop_string";
  }
  return "unknown";
}

}  // namespace

std::string StepLoop::OutcomeOf(const absl::Status& status) {
  return absl::AsciiStrToLower(absl::StatusCodeToString(status.code()));
}

void StepLoop::FinishGeneration(RequestState* request, FinishReason reason, int32_t matched,
                                absl::Time now) {
  if (reason != FinishReason::kStopString && request->stop_condition != nullptr &&
      request->stop_condition->Finish()) {
    reason = FinishReason::kStopString;
    matched = -1;
  }
  // The slot holds the state until End: after the prompt and the emitted tokens; with kLength
  // without the last emitted one, which was not fed.
  if (request->final_state != nullptr) {
    FinalState& final_state = *request->final_state;
    // With kStopString it was read where the output was last open (HoldFinalState).
    if (request->max_new_tokens > 0 && reason != FinishReason::kStopString) {
      const bool pending = reason == FinishReason::kLength;
      ReadFinalState(request, request->prompt_tokens + request->emitted - (pending ? 1 : 0),
                     pending ? std::vector<int32_t>{request->last_token} : std::vector<int32_t>());
    }
    if (!request->read_status.ok()) {
      Fail(request, absl::InternalError("the state could not be read from the device"), now);
      return;
    }
    const size_t kept = kMaxFinalTokens + final_state.pending.size();
    if (final_state.emitted.size() > kept) {
      final_state.emitted.erase(final_state.emitted.begin(),
                                final_state.emitted.end() - static_cast<ptrdiff_t>(kept));
    }
  }
  if (MayEndEarly(*request) && request->max_new_tokens > 0) {
    current_throughput_.ObserveEnd(request->max_new_tokens, request->emitted);
  }
  GenerationResult& result = request->generation;
  result.reason = reason;
  result.matched_stop_token = matched;
  result.usage.prompt_tokens = request->prompt_tokens;
  result.usage.completion_tokens = request->emitted;
  result.timings.queued = Elapsed(request->submitted, request->first_step);
  if (request->max_new_tokens > 0) {
    result.timings.prefill = Elapsed(request->first_step, request->first_token);
    result.timings.decode = Elapsed(request->first_token, now);
  } else {
    result.timings.prefill = Elapsed(request->first_step, now);
  }
  End(request, ReasonName(reason), now);
}

void StepLoop::FinishScore(RequestState* request, absl::Time now) {
  request->score.timings.queued = Elapsed(request->submitted, request->first_step);
  request->score.timings.prefill = Elapsed(request->first_step, now);
  End(request, "scored", now);
}

void StepLoop::Fail(RequestState* request, const absl::Status& status, absl::Time now) {
  request->status = status;
  End(request, OutcomeOf(status), now);
}

void StepLoop::FailPlanned(const absl::Status& status, absl::Time now) {
  for (const Policy::Row& row : plan_.rows) Fail(StateOf(row.entry), status, now);
  // Their states may not have been saved.
  for (const Policy::Preemption& preemption : plan_.preempted) {
    if (preemption.entry->phase != Phase::kNone) Fail(StateOf(preemption.entry), status, now);
  }
}

void StepLoop::FailAll(const absl::Status& status, absl::Time now) {
  while (!requests_.empty()) Fail(requests_.begin()->second.get(), status, now);
}

// Frees what the request holds and passes it to its delivery thread; it is valid until Publish.
void StepLoop::End(RequestState* request, absl::string_view outcome, absl::Time now) {
  const size_t priority = static_cast<size_t>(request->priority);
  switch (request->phase) {
    case Phase::kWaiting:
      dequeued_.push_back(request);
      --changes_.waiting[priority];
      break;
    case Phase::kPreempted:
      --changes_.evicted[priority];
      break;
    case Phase::kParked:
      --changes_.evicted[priority];
      break;
    case Phase::kPaused:
      --changes_.running[priority];
      break;
    case Phase::kPrefill:
    case Phase::kDecode:
      --changes_.running[priority];
      break;
    case Phase::kNone:
      break;
  }
  CountAs(request, RequestState::Counted::kNot);
  CountPrompt(request, 0);
  counts_changed_ = true;
  tokens_done_ += std::exchange(request->tokens_left, 0);
  sharing_.Leave(request);
  policy_.Remove(request);
  metrics_->CountRequest(outcome);
  metrics_->ObserveEndToEndLatency(Elapsed(request->submitted, now));
  metrics_->ObserveRequestTokens(request->prompt_tokens, request->emitted);
  delivery_.AddEnd(std::move(requests_.extract(request->id).mapped()));
}

}  // namespace mmfree
