// One step of the backend and what its output means for the requests: the step thread.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
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
    metrics_->ObserveStep(kind, rows, plan_.tokens + proposed_, Elapsed(start, end));
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
  if (request->device_state != nullptr) {
    MMFREE_RETURN_IF_ERROR(backend_->CopySlot(request->device_state->slot(), request->slot));
    // Whoever gets the place next is copied to it after this.
    request->device_state.reset();
  } else if (request->initial_state == nullptr) {
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
  policy_.Refile(request);
}

void StepLoop::ReadFinalState(RequestState* request, int64_t fed, std::vector<int32_t> pending) {
  FinalState& out = *request->final_state;
  out.fed = fed;
  out.pending = std::move(pending);
  request->read_status = TakeBackRejected(request);
  if (request->final_on_device && out.device == nullptr) out.device = options_.device_pool->Take();
  if (out.device != nullptr) {
    request->read_status.Update(backend_->CopySlot(request->slot, out.device->slot()));
    return;
  }
  out.state.resize(static_cast<size_t>(backend_->info().state_floats));
  request->read_status.Update(backend_->ReadSlot(request->slot, absl::MakeSpan(out.state)));
}

void StepLoop::HoldFinalState(RequestState* request) {
  FinalState& out = *request->final_state;
  const int64_t settled = request->stop_condition->settled();
  // The slot is at the state before the last emitted token, which is where the output is open from
  // unless it was before.
  if (settled == request->emitted - 1) {
    ReadFinalState(request, request->prompt_tokens + settled, {});
  }
  if (settled < request->emitted) out.pending.push_back(request->last_token);
}

// Feeds the planned rows.
absl::Status StepLoop::TryStep(absl::Time start) {
  MMFREE_RETURN_IF_ERROR(MoveStates(start));
  rows_.clear();
  proposed_ = 0;
  const int64_t room = std::min(kMaxProposedTokens, policy_.step_token_budget() - plan_.tokens);
  for (const Policy::Row& planned : plan_.rows) {
    RequestState* const request = StateOf(planned.entry);
    StepRow& row = rows_.emplace_back();
    row.slot = request->slot;
    if (request->phase == Phase::kDecode) {
      row.tokens = absl::MakeConstSpan(&request->last_token, 1);
      row.position = request->first_position +
                     static_cast<uint64_t>(request->prompt_tokens + request->emitted - 1);
      row.sampling = &request->sampling;
      if (request->speculation != nullptr) {
        request->speculation->Extend(*request, room - proposed_, &row);
        proposed_ += static_cast<int64_t>(row.inner.size());
      }
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
    if (request->prompt_sampler != nullptr) ListAlternatives(request, last_chunk, &row);
  }
  MMFREE_RETURN_IF_ERROR(backend_->Step(rows_, &output_));
  return CheckOutput();
}

absl::Status StepLoop::CheckOutput() const {
  size_t inner = 0;
  size_t scores = 0;
  size_t logits = 0;
  for (const StepRow& row : rows_) {
    inner += row.inner.size();
    scores += row.targets.size();
    if (row.logits == LogitsMode::kLast) logits += static_cast<size_t>(options_.vocab_size);
  }
  if (output_.samples.size() != rows_.size() || output_.scores.size() != scores ||
      output_.logits.size() != logits || (inner > 0 && output_.inner_samples.size() != inner)) {
    return absl::InternalError(absl::StrCat(
        "the backend returned ", output_.samples.size(), " samples, ", output_.inner_samples.size(),
        " inner samples, ", output_.scores.size(), " scores and ", output_.logits.size(),
        " logits for ", rows_.size(), ", ", inner, ", ", scores, " and ", logits));
  }
  const auto check = [this](const SamplingParams& sampling, const SampledToken& sample) {
    // A sampler with nothing to choose from gives -1.
    const int32_t least = sampling.sampler != nullptr ? -1 : 0;
    if (sample.token >= least && sample.token < options_.vocab_size) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("the backend sampled token ", sample.token));
  };
  const SampledToken* inner_sample = output_.inner_samples.data();
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (const SamplingParams& sampling : rows_[i].inner) {
      MMFREE_RETURN_IF_ERROR(check(sampling, *inner_sample++));
    }
    if (rows_[i].sampling != nullptr) {
      MMFREE_RETURN_IF_ERROR(check(*rows_[i].sampling, output_.samples[i]));
    }
  }
  return absl::OkStatus();
}

void StepLoop::HandleOutput(absl::Time now) {
  emitted_ = 0;
  const SampledToken* inner = output_.inner_samples.data();
  const TokenScore* scores = output_.scores.data();
  const float* logits = output_.logits.data();
  for (size_t i = 0; i < rows_.size(); ++i) {
    RequestState* const request = StateOf(plan_.rows[i].entry);
    const StepRow& row = rows_[i];
    const absl::Span<const SampledToken> row_inner(inner, row.inner.size());
    inner += row.inner.size();
    if (static_cast<int32_t>(i) >= plan_.decode_rows) {
      tokens_done_ += plan_.rows[i].tokens;
      request->tokens_left -= plan_.rows[i].tokens;
      CountPrompt(request, request->prompt_tokens - request->fed);
    }
    if (!row.targets.empty()) {
      const int64_t first = request->fed - static_cast<int64_t>(row.tokens.size());
      HandleScores(request, absl::MakeConstSpan(scores, row.targets.size()), first);
      scores += row.targets.size();
      if (request->prompt_sampler != nullptr) {
        HandleAlternatives(request, row_inner, output_.samples[i], first);
      }
    }
    if (row.sampling != nullptr && request->fed == request->prompt_tokens) {
      EmitRow(request, row, row_inner, output_.samples[i], now);
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

void StepLoop::HandleFault(const absl::Status& fault, absl::Time now) {
  Log(LogLevel::kError, absl::StrCat("step of ", plan_.rows.size(), " rows, ", plan_.tokens,
                                     " tokens: ", fault.ToString()));
  FailPlanned(absl::InternalError("the device failed while it processed the request"), now);
  // A refused call changed nothing: it is a fault of this program, and the device still serves.
  if (absl::IsInvalidArgument(fault)) return;
  broken_ = true;
  if (options_.device_pool != nullptr) options_.device_pool->Close();
  {
    absl::MutexLock lock(&mutex_);
    faulted_ = true;
  }
  if (options_.fault_listener) options_.fault_listener();
  FailAll(absl::UnavailableError("the device has failed"), now);
}

}  // namespace mmfree
