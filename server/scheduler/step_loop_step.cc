// One step of the backend and what its output means for the requests: the step thread.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

// Appends, and now and then drops what is too old, so that a token costs a constant time.
void Remember(int32_t token, std::vector<int32_t>* tokens) {
  if (tokens->size() >= 2 * kMaxFinalTokens) {
    tokens->erase(tokens->begin(), tokens->end() - kMaxFinalTokens);
  }
  tokens->push_back(token);
}

}  // namespace

void StepLoop::Step(absl::Time start) {
  const absl::Status status = TryStep(start);
  const absl::Time end = options_.clock->Now();
  if (status.ok()) {
    policy_.CompleteStep(plan_);
    for (const Policy::Row& row : plan_.rows) CaptureState(StateOf(row.entry));
    HandleOutput(end);
    const int64_t rows = static_cast<int64_t>(plan_.rows.size());
    const auto kind = plan_.decode_rows == rows ? ModelMetrics::StepKind::kDecode
                      : plan_.decode_rows == 0  ? ModelMetrics::StepKind::kPrefill
                                                : ModelMetrics::StepKind::kMixed;
    metrics_->ObserveStep(kind, rows, plan_.tokens, Elapsed(start, end));
    if (plan_.tokens > plan_.decode_rows) {
      metrics_->CountPromptTokens(plan_.tokens - plan_.decode_rows);
    }
    if (emitted_ > 0) metrics_->CountGeneratedTokens(emitted_);
  } else {
    HandleFault(status, end);
  }
  current_throughput_.Observe(Elapsed(start, end), plan_.decode_rows,
                              plan_.tokens - plan_.decode_rows);
  ApplyChanges();
  delivery_.Publish();
}

// Carries out what the plan says of slots.
absl::Status StepLoop::MoveStates(absl::Time start) {
  for (const Policy::Preemption& preemption : plan_.preempted) {
    RequestState* const request = StateOf(preemption.entry);
    // One that was resumed in the same plan goes on as it was, or has been prepared anew.
    if (request->slot < 0) sharing_.Leave(request);
    if (!std::exchange(request->state_in_slot, false)) continue;
    std::vector<float>& state = request->saved_state;
    state.resize(static_cast<size_t>(backend_->info().state_floats));
    MMFREE_RETURN_IF_ERROR(backend_->ReadSlot(preemption.slot, absl::MakeSpan(state)));
  }
  for (SchedulerEntry* entry : plan_.resumed) {
    RequestState* const request = StateOf(entry);
    if (request->saved_state.empty()) continue;  // not begun when it lost its slot
    const std::vector<float> state = std::exchange(request->saved_state, {});
    MMFREE_RETURN_IF_ERROR(backend_->WriteSlot(request->slot, state));
    request->state_in_slot = true;
  }
  for (SchedulerEntry* entry : plan_.admitted) {
    StateOf(entry)->first_step = start;
    metrics_->ObserveQueueTime(Elapsed(StateOf(entry)->submitted, start));
  }
  for (size_t i = plan_.decode_rows; i < plan_.rows.size(); ++i) {
    RequestState* const request = StateOf(plan_.rows[i].entry);
    if (!request->state_in_slot) MMFREE_RETURN_IF_ERROR(InitializeSlot(request));
  }
  return absl::OkStatus();
}

// Gives the slot of a request that is fed for the first time the state after request->fed tokens of
// its prompt.
absl::Status StepLoop::InitializeSlot(RequestState* request) {
  if (request->initial_state == nullptr) {
    MMFREE_RETURN_IF_ERROR(backend_->ZeroSlot(request->slot));
  } else {
    MMFREE_RETURN_IF_ERROR(backend_->WriteSlot(request->slot, *request->initial_state));
    request->initial_state.reset();
  }
  request->state_in_slot = true;
  CaptureState(request);
  return absl::OkStatus();
}

// Reads the state of a slot that has reached its request's chunk boundary.
void StepLoop::CaptureState(RequestState* request) {
  if (request->fed != request->chunk_boundary) return;
  if (request->final_state != nullptr && request->fed == request->final_boundary()) {
    // Not back(): a target for scores may stand behind the prompt.
    ReadFinalState(request, request->fed, {request->tokens[request->prompt_tokens - 1]});
  }
  if (!PrefixSharing::WantsState(*request)) return;
  auto state = std::make_shared<std::vector<float>>(backend_->info().state_floats);
  const bool read = backend_->ReadSlot(request->slot, absl::MakeSpan(*state)).ok();
  sharing_.AddState(request, read ? std::move(state) : nullptr);
}

void StepLoop::ReadFinalState(RequestState* request, int64_t fed, std::vector<int32_t> pending) {
  FinalState& out = *request->final_state;
  out.state.resize(static_cast<size_t>(backend_->info().state_floats));
  request->read_status = backend_->ReadSlot(request->slot, absl::MakeSpan(out.state));
  out.fed = fed;
  out.pending = std::move(pending);
}

// Feeds the planned rows.
absl::Status StepLoop::TryStep(absl::Time start) {
  MMFREE_RETURN_IF_ERROR(MoveStates(start));
  rows_.clear();
  for (const Policy::Row& planned : plan_.rows) {
    RequestState* const request = StateOf(planned.entry);
    StepRow& row = rows_.emplace_back();
    row.slot = request->slot;
    if (request->phase == Phase::kDecode) {
      row.tokens = absl::MakeConstSpan(&request->last_token, 1);
      row.position = request->first_position +
                     static_cast<uint64_t>(request->prompt_tokens + request->emitted - 1);
      row.sampling = &request->sampling;
      continue;
    }
    const absl::Span<const int32_t> tokens = request->tokens;
    row.tokens = tokens.subspan(request->fed, planned.tokens);
    row.position = request->first_position + static_cast<uint64_t>(request->fed);
    const bool last_chunk = request->fed + planned.tokens == request->prompt_tokens;
    if (request->score_sink != nullptr || request->prompt_logprobs) {
      row.targets = tokens.subspan(request->fed + 1, planned.tokens);
    }
    if (request->score_sink != nullptr) {
      if (last_chunk && request->last_logits) row.logits = LogitsMode::kLast;
    } else if (last_chunk && request->max_new_tokens > 0) {
      row.sampling = &request->sampling;
    }
  }
  MMFREE_RETURN_IF_ERROR(backend_->Step(rows_, &output_));
  return CheckOutput();
}

absl::Status StepLoop::CheckOutput() const {
  size_t scores = 0;
  size_t logits = 0;
  for (const StepRow& row : rows_) {
    scores += row.targets.size();
    if (row.logits == LogitsMode::kLast) logits += static_cast<size_t>(options_.vocab_size);
  }
  if (output_.samples.size() != rows_.size() || output_.scores.size() != scores ||
      output_.logits.size() != logits) {
    return absl::InternalError(absl::StrCat("the backend returned ", output_.samples.size(),
                                            " samples, ", output_.scores.size(), " scores and ",
                                            output_.logits.size(), " logits for ", rows_.size(),
                                            ", ", scores, " and ", logits));
  }
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].sampling == nullptr) continue;
    const int32_t token = output_.samples[i].token;
    // A sampler with nothing to choose from gives -1.
    const int32_t least = rows_[i].sampling->sampler != nullptr ? -1 : 0;
    if (token < least || token >= options_.vocab_size) {
      return absl::InternalError(absl::StrCat("the backend sampled token ", token));
    }
  }
  return absl::OkStatus();
}

void StepLoop::HandleOutput(absl::Time now) {
  emitted_ = 0;
  const TokenScore* scores = output_.scores.data();
  const float* logits = output_.logits.data();
  for (size_t i = 0; i < rows_.size(); ++i) {
    RequestState* const request = StateOf(plan_.rows[i].entry);
    const StepRow& row = rows_[i];
    if (static_cast<int32_t>(i) >= plan_.decode_rows) {
      tokens_done_ += plan_.rows[i].tokens;
      request->tokens_left -= plan_.rows[i].tokens;
      WorkOf(*request).prompt_tokens -= plan_.rows[i].tokens;
    }
    if (!row.targets.empty()) {
      HandleScores(request, absl::MakeConstSpan(scores, row.targets.size()),
                   request->fed - static_cast<int64_t>(row.tokens.size()));
      scores += row.targets.size();
    }
    if (row.sampling != nullptr) {
      Emit(request, output_.samples[i], now);
      continue;
    }
    if (row.logits == LogitsMode::kLast) {
      request->score.last_logits.assign(logits, logits + options_.vocab_size);
      logits += options_.vocab_size;
    }
    if (request->fed < request->prompt_tokens) continue;
    if (request->score_sink != nullptr) {
      FinishScore(request, now);
    } else {
      FinishGeneration(request, FinishReason::kLength, -1, now);
    }
  }
  ReportInterToken();
}

// `scores` are of the tokens after positions first, first + 1, ...
void StepLoop::HandleScores(RequestState* request, absl::Span<const TokenScore> scores,
                            int64_t first) {
  ScoreResult& result = request->score;
  for (size_t i = 0; i < scores.size(); ++i) {
    const size_t position = static_cast<size_t>(first) + i;
    result.argmax[position] = scores[i].argmax;
    if (position < result.logprobs.size()) result.logprobs[position] = scores[i].logprob;
  }
}

void StepLoop::Emit(RequestState* request, SampledToken token, absl::Time now) {
  if (token.token < 0) {
    Fail(request,
         absl::InvalidArgumentError("sampling: no token is left to choose from at this point"),
         now);
    return;
  }
  if (request->emitted == 0) {
    request->first_token = now;
    request->latest_token = now;
    std::vector<int32_t>().swap(request->tokens);  // the prompt is not needed any more
  }
  const std::vector<int32_t>& ends = request->end_tokens;
  if (const auto end = std::find(ends.begin(), ends.end(), token.token); end != ends.end()) {
    const bool eos = static_cast<size_t>(end - ends.begin()) < request->num_eos;
    FinishGeneration(request, eos ? FinishReason::kEos : FinishReason::kStopToken, token.token,
                     now);
    return;
  }
  delivery_.AddToken(request, token);
  if (request->final_state != nullptr) Remember(token.token, &request->final_state->emitted);
  ++emitted_;
  ++request->emitted;
  --request->tokens_left;
  ++tokens_done_;
  request->last_token = token.token;
  if (request->expected_steps > 1) {
    ClassWork& work = WorkOf(*request);
    work.AddRunning(request->expected_steps, -1);
    work.AddRunning(--request->expected_steps, 1);
  }
  if (request->sampler != nullptr) request->sampler->Append(token.token);
  if (request->emitted == 1) {
    metrics_->ObserveTimeToFirstToken(Elapsed(request->submitted, now));
  } else {
    // Rows that decode together have waited alike, so the step reports them together.
    const absl::Duration gap = Elapsed(request->latest_token, now);
    if (gap != inter_token_gap_) ReportInterToken();
    inter_token_gap_ = gap;
    ++inter_token_count_;
    request->latest_token = now;
  }
  if (request->stop_condition != nullptr && request->stop_condition->Append(token.token)) {
    FinishGeneration(request, FinishReason::kStopString, -1, now);
    return;
  }
  if (request->emitted == request->max_new_tokens) {
    FinishGeneration(request, FinishReason::kLength, -1, now);
    return;
  }
  if (request->emitted == request->min_new_tokens) request->sampling.banned = {};
  if (--request->until_backlog_check < 0) {
    const int64_t limit = static_cast<int64_t>(options_.max_stream_backlog);
    const int64_t backlog = Backlog(*request);
    request->until_backlog_check = limit - backlog;
    if (backlog > limit) {
      request->least_backlog = backlog;
      request->last_read = now;
      Pause(request);
    }
  }
}

void StepLoop::ReportInterToken() {
  if (inter_token_count_ > 0) {
    metrics_->ObserveInterTokenLatency(inter_token_gap_, inter_token_count_);
  }
  inter_token_count_ = 0;
}

void StepLoop::HandleFault(const absl::Status& fault, absl::Time now) {
  Log(LogLevel::kError, absl::StrCat("step of ", plan_.rows.size(), " rows, ", plan_.tokens,
                                     " tokens: ", fault.ToString()));
  FailPlanned(absl::InternalError("the device failed while it processed the request"), now);
  // A refused call changed nothing: it is a fault of this program, and the device still serves.
  if (absl::IsInvalidArgument(fault)) return;
  broken_ = true;
  {
    absl::MutexLock lock(&mutex_);
    faulted_ = true;
  }
  if (options_.fault_listener) options_.fault_listener();
  FailAll(absl::UnavailableError("the device has failed"), now);
}

}  // namespace mmfree
