#include "server/scheduler/step_loop.h"

#include <pthread.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

// How often the backlogs of paused rows are looked at while nothing else runs. A row resumes at
// half its limit, so its client has that much left to read meanwhile.
constexpr absl::Duration kPausedPoll = absl::Milliseconds(5);
// Paused rows looked at in one iteration: bounds what a thousand idle readers cost the others.
constexpr size_t kPausedChecks = 256;

// Wall clocks step back now and then.
absl::Duration Elapsed(absl::Time from, absl::Time to) {
  return std::max(to - from, absl::ZeroDuration());
}

std::string Outcome(const absl::Status& status) {
  return absl::AsciiStrToLower(absl::StatusCodeToString(status.code()));
}

absl::string_view Outcome(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStopToken:
      return "stop_token";
  }
  return "unknown";
}

Policy::Options WithSlots(Policy::Options options, const BackendInfo& info) {
  options.num_slots = info.num_slots;
  options.step_token_budget = std::min(options.step_token_budget, info.max_step_tokens);
  return options;
}

RequestState* StateOf(SchedulerEntry* entry) { return static_cast<RequestState*>(entry); }

}  // namespace

StepLoop::StepLoop(const Options& options, std::unique_ptr<Backend> backend, ModelMetrics* metrics)
    : options_(options),
      backend_(std::move(backend)),
      metrics_(metrics),
      admission_({Policy::Capacity(WithSlots(options.policy, backend_->info())), options.max_queue,
                  options.max_queue_tokens}),
      policy_(WithSlots(options.policy, backend_->info())),
      delivery_(options.delivery_threads) {
  {
    absl::MutexLock lock(&mutex_);
    SetAdmissionGauges();
  }
  metrics_->SetPaused(0);
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "mmfree-step");
    Run();
  });
}

StepLoop::~StepLoop() {
  Drain(absl::InfinitePast());
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

// --- Submission: any thread ---------------------------------------------------------------------

absl::Status StepLoop::CheckTokens(absl::Span<const int32_t> tokens, absl::string_view what) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= options_.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(what, "[", i, "] is ", tokens[i],
                                                     ", not a token id of the vocabulary of ",
                                                     options_.vocab_size));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RequestHandle> StepLoop::Submit(GenerationRequest request,
                                               std::shared_ptr<GenerationSink> sink) {
  auto state = std::make_unique<RequestState>();
  state->generation_sink = std::move(sink);
  state->deadline = request.deadline;
  state->max_new_tokens = request.max_new_tokens;
  state->min_new_tokens = request.min_new_tokens;
  state->num_eos = request.eos_token_ids.size();
  state->end_tokens = std::move(request.eos_token_ids);
  state->end_tokens.insert(state->end_tokens.end(), request.stop_token_ids.begin(),
                           request.stop_token_ids.end());
  state->tokens = std::move(request.prompt);
  state->prompt_tokens = static_cast<int64_t>(state->tokens.size());
  state->sampling = request.sampling;
  state->sampling.banned = {};
  if (state->min_new_tokens > 0) state->sampling.banned = state->end_tokens;
  state->until_backlog_check = static_cast<int64_t>(options_.max_stream_backlog);

  absl::Status valid = absl::OkStatus();
  if (state->tokens.empty()) valid = absl::InvalidArgumentError("the prompt has no token");
  if (state->max_new_tokens < 0) valid = absl::InvalidArgumentError("max_new_tokens is negative");
  if (state->end_tokens.size() > kMaxBannedTokens) {
    valid = absl::InvalidArgumentError(absl::StrCat("at most ", kMaxBannedTokens,
                                                    " token ids can end a generation, not ",
                                                    state->end_tokens.size()));
  }
  valid.Update(CheckTokens(state->tokens, "prompt"));
  valid.Update(CheckTokens(state->end_tokens, "ending token ids"));
  return SubmitState(std::move(state), std::move(valid));
}

absl::StatusOr<RequestHandle> StepLoop::Submit(ScoreRequest request,
                                               std::shared_ptr<ScoreSink> sink) {
  auto state = std::make_unique<RequestState>();
  state->score_sink = std::move(sink);
  state->deadline = request.deadline;
  state->last_logits = request.last_logits;
  state->tokens = std::move(request.tokens);
  const size_t count = state->tokens.size();
  state->prompt_tokens = static_cast<int64_t>(count);

  absl::Status valid = absl::OkStatus();
  if (count == 0) valid = absl::InvalidArgumentError("there is no token to score");
  valid.Update(CheckTokens(state->tokens, "tokens"));
  if (valid.ok()) {
    // Targets of a chunk are the tokens that follow; after the last one nothing is known.
    state->tokens.push_back(-1);
    state->score.logprobs.resize(count - 1);
    state->score.argmax.resize(count);
  }
  return SubmitState(std::move(state), std::move(valid));
}

absl::StatusOr<RequestHandle> StepLoop::SubmitState(std::unique_ptr<RequestState> request,
                                                    absl::Status valid) {
  request->submitted = options_.clock->Now();
  if (valid.ok() && request->deadline <= request->submitted) {
    valid = absl::DeadlineExceededError("the deadline had passed on arrival");
  }
  if (valid.ok()) {
    absl::MutexLock lock(&mutex_);
    valid = Admit(*request);
    if (valid.ok()) {
      const RequestHandle handle = next_handle_++;
      request->id = handle;
      submissions_.push_back(std::move(request));
      SetAdmissionGauges();
      return handle;
    }
  }
  metrics_->CountRequest(Outcome(valid));
  return valid;
}

absl::Status StepLoop::Admit(const RequestState& request) {
  if (faulted_) return absl::UnavailableError("the device has failed");
  if (draining_) return absl::UnavailableError("the server is draining");
  return admission_.Admit(request.prompt_tokens);
}

void StepLoop::SetAdmissionGauges() {
  metrics_->SetQueued(admission_.waiting());
  metrics_->SetRunning(admission_.running());
  metrics_->SetSlots(admission_.running(), backend_->info().num_slots);
}

void StepLoop::Cancel(RequestHandle handle) {
  absl::MutexLock lock(&mutex_);
  cancellations_.push_back(handle);
}

void StepLoop::Drain(absl::Time deadline) {
  RequestHandle admitted = 0;
  {
    // Whatever is left runs or is paused, so the step thread looks at the deadline by itself.
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    drain_deadline_ = std::min(drain_deadline_, deadline);
    mutex_.Await(absl::Condition(&admission_, &AdmissionControl::empty));
    admitted = next_handle_ - 1;
  }
  // A request leaves the admission counts before its sink hears of the end.
  delivery_.WaitForEnds(static_cast<int64_t>(admitted));
}

StepLoop::Load StepLoop::load() const {
  absl::MutexLock lock(&mutex_);
  Load load;
  load.waiting = admission_.waiting();
  load.waiting_tokens = admission_.waiting_tokens();
  load.running = admission_.running();
  load.estimated_wait = throughput_.EstimatedWait(admission_.departures_before_next());
  return load;
}

// --- An iteration: the step thread --------------------------------------------------------------

void StepLoop::Run() {
  while (TakeInbox()) {
    const absl::Time now = options_.clock->Now();
    EnqueueSubmissions();
    EndCancelled(now);
    EndOverdue(now);
    ResumeDrained();
    policy_.PlanStep(&plan_);
    for (const SchedulerEntry* entry : plan_.admitted) {
      ++changes_.started;
      changes_.started_tokens += entry->prompt_tokens;
    }
    // What ended above is told now: a step can take long.
    ApplyChanges();
    delivery_.Publish();
    if (!plan_.rows.empty()) Step(now);
  }
}

// Returns false when the loop is to stop.
bool StepLoop::TakeInbox() {
  const auto something_came = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !submissions_.empty() || !cancellations_.empty() || stopping_;
  };
  absl::MutexLock lock(&mutex_);
  if (plan_.rows.empty()) {
    const absl::Condition condition(&something_came);
    if (policy_.paused().empty()) {
      mutex_.Await(condition);
    } else {
      mutex_.AwaitWithTimeout(condition, kPausedPoll);
    }
  }
  new_submissions_.swap(submissions_);
  new_cancellations_.swap(cancellations_);
  end_all_at_ = drain_deadline_;
  throughput_ = current_throughput_;
  return !stopping_;
}

void StepLoop::EnqueueSubmissions() {
  for (std::unique_ptr<RequestState>& request : new_submissions_) {
    policy_.Enqueue(request.get());
    const RequestHandle handle = request->id;
    requests_.emplace(handle, std::move(request));
  }
  new_submissions_.clear();
}

void StepLoop::EndCancelled(absl::Time now) {
  for (const RequestHandle handle : new_cancellations_) {
    const auto found = requests_.find(handle);
    if (found == requests_.end()) continue;  // has ended
    Fail(found->second.get(), absl::CancelledError("the request was cancelled"), now);
  }
  new_cancellations_.clear();
}

void StepLoop::EndOverdue(absl::Time now) {
  if (broken_) FailAll(absl::UnavailableError("the device has failed"), now);
  if (now >= end_all_at_) FailAll(absl::UnavailableError("the server is shutting down"), now);
  expired_.clear();
  policy_.CollectExpired(now, &expired_);
  for (SchedulerEntry* entry : expired_) {
    Fail(StateOf(entry), absl::DeadlineExceededError("the deadline passed"), now);
  }
}

// Tokens that were emitted and the client has not taken. While the delivery thread hands tokens to
// the sink they may count twice, never not at all.
int64_t StepLoop::Backlog(const RequestState& request) const {
  return request.emitted - request.delivered.load(std::memory_order_relaxed) +
         static_cast<int64_t>(request.generation_sink->backlog());
}

void StepLoop::ResumeDrained() {
  const int64_t low = static_cast<int64_t>(options_.max_stream_backlog / 2);
  const size_t checks = std::min(policy_.paused().size(), kPausedChecks);
  for (size_t i = 0; i < checks; ++i) {
    if (paused_cursor_ >= policy_.paused().size()) paused_cursor_ = 0;
    RequestState* const request = StateOf(policy_.paused()[paused_cursor_]);
    const int64_t backlog = Backlog(*request);
    if (backlog <= low) {
      request->until_backlog_check = static_cast<int64_t>(options_.max_stream_backlog) - backlog;
      policy_.Resume(request);  // another takes its place in the list
    } else {
      ++paused_cursor_;
    }
  }
}

// Makes what started and ended known to the others: before any sink hears of an end, so that its
// place is free and the gauges are right when it does.
void StepLoop::ApplyChanges() {
  if (const size_t paused = policy_.paused().size(); paused != paused_gauge_) {
    metrics_->SetPaused(static_cast<int64_t>(paused));
    paused_gauge_ = paused;
  }
  if (changes_.started + changes_.ended_waiting + changes_.ended_running == 0) return;
  absl::MutexLock lock(&mutex_);
  admission_.Started(changes_.started, changes_.started_tokens);
  admission_.EndedWaiting(changes_.ended_waiting, changes_.ended_waiting_tokens);
  admission_.EndedRunning(changes_.ended_running);
  changes_ = AdmissionChanges();
  SetAdmissionGauges();
}

// --- A step: the step thread --------------------------------------------------------------------

void StepLoop::Step(absl::Time start) {
  const absl::Status status = TryStep(start);
  const absl::Time end = options_.clock->Now();
  if (status.ok()) {
    policy_.CompleteStep(plan_);
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
  current_throughput_.Observe(Elapsed(start, end), changes_.ended_running);
  ApplyChanges();
  delivery_.Publish();
}

// Feeds the planned rows.
absl::Status StepLoop::TryStep(absl::Time start) {
  for (SchedulerEntry* entry : plan_.admitted) {
    StateOf(entry)->first_step = start;
    metrics_->ObserveQueueTime(Elapsed(StateOf(entry)->submitted, start));
    MMFREE_RETURN_IF_ERROR(backend_->ZeroSlot(entry->slot));
  }
  rows_.clear();
  for (const Policy::Row& planned : plan_.rows) {
    RequestState* const request = StateOf(planned.entry);
    StepRow& row = rows_.emplace_back();
    row.slot = request->slot;
    if (request->phase == Phase::kDecode) {
      row.tokens = absl::MakeConstSpan(&request->last_token, 1);
      row.position = static_cast<uint64_t>(request->prompt_tokens + request->emitted - 1);
      row.sampling = &request->sampling;
      continue;
    }
    const absl::Span<const int32_t> tokens = request->tokens;
    row.tokens = tokens.subspan(request->fed, planned.tokens);
    row.position = static_cast<uint64_t>(request->fed);
    const bool last_chunk = request->fed + planned.tokens == request->prompt_tokens;
    if (request->score_sink != nullptr) {
      row.targets = tokens.subspan(request->fed + 1, planned.tokens);
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
    const int32_t token = output_.samples[i].token;
    if (rows_[i].sampling != nullptr && (token < 0 || token >= options_.vocab_size)) {
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
    if (row.sampling != nullptr) {
      Emit(request, output_.samples[i], now);
      continue;
    }
    if (request->score_sink != nullptr) {
      HandleScores(request, absl::MakeConstSpan(scores, row.targets.size()),
                   static_cast<int64_t>(row.position));
      scores += row.targets.size();
      if (row.logits == LogitsMode::kLast) {
        request->score.last_logits.assign(logits, logits + options_.vocab_size);
        logits += options_.vocab_size;
      }
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
  ++emitted_;
  ++request->emitted;
  request->last_token = token.token;
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
  if (request->emitted == request->max_new_tokens) {
    FinishGeneration(request, FinishReason::kLength, -1, now);
    return;
  }
  if (request->emitted == request->min_new_tokens) request->sampling.banned = {};
  if (--request->until_backlog_check < 0) {
    const int64_t limit = static_cast<int64_t>(options_.max_stream_backlog);
    const int64_t backlog = Backlog(*request);
    request->until_backlog_check = limit - backlog;
    if (backlog > limit) policy_.Pause(request);
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

// --- Ends: the step thread ----------------------------------------------------------------------

void StepLoop::FinishGeneration(RequestState* request, FinishReason reason, int32_t matched,
                                absl::Time now) {
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
  End(request, Outcome(reason), now);
}

void StepLoop::FinishScore(RequestState* request, absl::Time now) {
  request->score.timings.queued = Elapsed(request->submitted, request->first_step);
  request->score.timings.prefill = Elapsed(request->first_step, now);
  End(request, "scored", now);
}

void StepLoop::Fail(RequestState* request, const absl::Status& status, absl::Time now) {
  request->status = status;
  End(request, Outcome(status), now);
}

void StepLoop::FailPlanned(const absl::Status& status, absl::Time now) {
  for (const Policy::Row& row : plan_.rows) Fail(StateOf(row.entry), status, now);
}

void StepLoop::FailAll(const absl::Status& status, absl::Time now) {
  while (!requests_.empty()) Fail(requests_.begin()->second.get(), status, now);
}

// Frees what the request holds and passes it to its delivery thread; it is valid until Publish.
void StepLoop::End(RequestState* request, absl::string_view outcome, absl::Time now) {
  if (request->phase == Phase::kWaiting) {
    ++changes_.ended_waiting;
    changes_.ended_waiting_tokens += request->prompt_tokens;
  } else {
    ++changes_.ended_running;
  }
  policy_.Remove(request);
  metrics_->CountRequest(outcome);
  metrics_->ObserveEndToEndLatency(Elapsed(request->submitted, now));
  metrics_->ObserveRequestTokens(request->prompt_tokens, request->emitted);
  delivery_.AddEnd(std::move(requests_.extract(request->id).mapped()));
}

}  // namespace mmfree
