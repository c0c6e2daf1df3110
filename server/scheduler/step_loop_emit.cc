// What rows sampled becomes what streams are given: the step thread.
#include <algorithm>
#include <utility>
#include <vector>

#include "server/sampling/dead_end.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

// Appends, and now and then drops what is too old, so that a token costs a constant time.
void Remember(int32_t token, std::vector<int32_t>* tokens) {
  if (tokens->size() >= 4 * kMaxFinalTokens) {
    tokens->erase(tokens->begin(), tokens->end() - 2 * kMaxFinalTokens);
  }
  tokens->push_back(token);
}

}  // namespace

// Also asks for the alternatives at the places of a chunk of the prompt.
void StepLoop::ListAlternatives(RequestState* request, bool last_chunk, StepRow* row) {
  SamplingParams params;
  params.sampler = request->prompt_sampler.get();
  request->chunk_sampling.assign(row->tokens.size(), params);
  row->inner = absl::MakeConstSpan(request->chunk_sampling).first(row->tokens.size() - 1);
  // What comes after the prompt is not part of it.
  if (!last_chunk) row->sampling = &request->chunk_sampling.back();
}

// `first`: the place of the chunk's first token; `last` is of the one after the chunk.
void StepLoop::HandleAlternatives(RequestState* request, absl::Span<const SampledToken> inner,
                                  const SampledToken& last, int64_t first) {
  const auto place = request->prompt_top.begin() + first;
  std::transform(inner.begin(), inner.end(), place,
                 [](const SampledToken& sample) { return sample.top; });
  if (request->fed < request->prompt_tokens) place[inner.size()] = last.top;
}

// The row's samples as far as its proposals agreed with them, and the one after that.
void StepLoop::EmitRow(RequestState* request, const StepRow& row,
                       absl::Span<const SampledToken> inner, const SampledToken& last,
                       absl::Time now) {
  if (!row.rewindable) {
    Emit(request, last, now);
    return;
  }
  const size_t proposed = inner.size();
  policy_.Charge(request, static_cast<int64_t>(proposed));
  size_t accepted = 0;
  while (true) {
    const SampledToken& token = accepted < proposed ? inner[accepted] : last;
    request->row_kept = static_cast<int32_t>(accepted) + 1;
    Emit(request, token, now);
    // One that has been paused samples the rest again.
    if (request->phase != Phase::kDecode || accepted == proposed ||
        token.token != row.tokens[accepted + 1]) {
      break;
    }
    ++accepted;
  }
  if (request->phase == Phase::kDecode) {
    request->speculation->Learn(static_cast<int64_t>(proposed), static_cast<int64_t>(accepted));
  }
  metrics_->CountSpeculation(static_cast<int64_t>(proposed), static_cast<int64_t>(accepted));
  if (request->phase == Phase::kNone) return;  // has ended
  if (!TakeBackRejected(request).ok()) {
    Fail(request, absl::InternalError("the state could not be taken back"), now);
  }
}

// Leaves the slot at the state after the tokens that stay.
absl::Status StepLoop::TakeBackRejected(RequestState* request) {
  const int32_t kept = std::exchange(request->row_kept, 0);
  return kept == 0 ? absl::OkStatus() : backend_->Rewind(request->slot, kept);
}

void StepLoop::Emit(RequestState* request, const SampledToken& token, absl::Time now) {
  if (token.token < 0) {
    absl::Status status =
        absl::InvalidArgumentError("sampling: no token is left to choose from at this point");
    if (request->sampler != nullptr) {
      SetExclusions(request->sampler->WhyNothing(request->sampling), &status);
    }
    Fail(request, status, now);
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
    Work& work = WorkOf(*request, &work_changes_);
    work.AddRunning(request->expected_steps, -1);
    work.AddRunning(--request->expected_steps, 1);
  }
  if (request->speculation != nullptr) request->speculation->Append(token.token);
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
  const bool stops =
      request->stop_condition != nullptr && request->stop_condition->Append(token.token);
  if (request->stop_condition != nullptr && request->final_state != nullptr) {
    HoldFinalState(request);
  }
  if (stops) {
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

}  // namespace mmfree
