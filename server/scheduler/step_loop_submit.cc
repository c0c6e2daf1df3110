// The submitting side of the step loop: any thread. See step_loop.h.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/scheduler/retry_after.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

// Makes room for the scores of the tokens, which are at least one.
void MakeTargets(RequestState* state) {
  const size_t count = state->tokens.size();
  // Targets of a chunk are the tokens that follow; after the last one nothing is known.
  state->tokens.push_back(-1);
  state->score.logprobs.resize(count - 1);
  state->score.argmax.resize(count);
}

}  // namespace

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
  state->prefix.space = sharing_.SpaceOf(request);
  state->first_position = request.first_position;
  state->initial_state = std::move(request.initial_state);
  absl::Status valid = absl::OkStatus();
  if (request.device_state != nullptr && request.device_state->pool() != options_.device_pool) {
    auto copy = std::make_shared<std::vector<float>>();
    valid = request.device_state->Read(copy.get());
    state->initial_state = std::move(copy);
  } else {
    state->device_state = std::move(request.device_state);
  }
  state->final_state = std::move(request.final_state);
  state->final_on_device = request.final_on_device && options_.device_pool != nullptr;
  state->priority = request.priority;
  state->caller = std::move(request.caller);
  state->tokens = std::move(request.prompt);
  state->prompt_tokens = static_cast<int64_t>(state->tokens.size());
  state->sampling = request.sampling;
  state->sampling.banned = {};
  state->sampler = std::move(request.sampler);
  state->sampling.sampler = state->sampler.get();
  state->stop_condition = std::move(request.stop_condition);
  state->prompt_logprobs = request.prompt_logprobs;
  if (request.prompt_top_logprobs > 0) {
    RequestSampler::Options options;
    options.top_logprobs = request.prompt_top_logprobs;
    state->prompt_sampler =
        std::make_unique<RequestSampler>(options, options_.vocab_size, absl::Span<const int32_t>());
  }
  // A slot that is ahead by several tokens on trial has no state between them to hold.
  const bool holds_states = state->final_state != nullptr && state->stop_condition != nullptr;
  if (request.speculative_tokens > 0 && !holds_states) {
    std::vector<int32_t> context = std::move(request.lookup_context);
    context.insert(context.end(), state->tokens.begin(), state->tokens.end());
    state->speculation =
        std::make_unique<Speculation>(request.speculative_tokens, std::move(context));
  }
  if (state->min_new_tokens > 0) state->sampling.banned = state->end_tokens;
  state->until_backlog_check = static_cast<int64_t>(options_.max_stream_backlog);
  // Without a next token to sample, the last one of the prompt is left to the next turn, which then
  // has something to feed: the state is read before it.
  state->chunk_boundary = state->final_boundary();

  if (state->tokens.empty()) valid = absl::InvalidArgumentError("the prompt has no token");
  if (state->max_new_tokens < 0) valid = absl::InvalidArgumentError("max_new_tokens is negative");
  if (state->end_tokens.size() > kMaxBannedTokens) {
    valid = absl::InvalidArgumentError(absl::StrCat("at most ", kMaxBannedTokens,
                                                    " token ids can end a generation, not ",
                                                    state->end_tokens.size()));
  }
  if (state->initial_state != nullptr &&
      static_cast<int64_t>(state->initial_state->size()) != backend_->info().state_floats) {
    valid = absl::InvalidArgumentError(
        absl::StrCat("the initial state has ", state->initial_state->size(),
                     " numbers, one of this model has ", backend_->info().state_floats));
  }
  state->tokens_left = state->prompt_tokens + state->max_new_tokens;
  valid.Update(CheckTokens(state->tokens, "prompt"));
  if (valid.ok() && state->prompt_logprobs) MakeTargets(state.get());
  if (state->prompt_sampler != nullptr) {
    if (!state->prompt_logprobs) {
      valid.Update(absl::InvalidArgumentError("prompt_top_logprobs needs prompt_logprobs"));
    }
    state->prompt_top.resize(state->score.logprobs.size());
  }
  valid.Update(CheckTokens(state->end_tokens, "ending token ids"));
  if (valid.ok()) {
    state->prefix.expected = sharing_.Peek(state->prefix.space, state->tokens);
    state->cached = state->prefix.expected;
  }
  return SubmitState(std::move(state), std::move(valid));
}

absl::StatusOr<RequestHandle> StepLoop::Submit(ScoreRequest request,
                                               std::shared_ptr<ScoreSink> sink) {
  auto state = std::make_unique<RequestState>();
  state->score_sink = std::move(sink);
  state->deadline = request.deadline;
  state->last_logits = request.last_logits;
  state->priority = request.priority;
  state->caller = std::move(request.caller);
  state->tokens = std::move(request.tokens);
  const size_t count = state->tokens.size();
  state->prompt_tokens = static_cast<int64_t>(count);
  state->tokens_left = state->prompt_tokens;

  absl::Status valid = absl::OkStatus();
  if (count == 0) valid = absl::InvalidArgumentError("there is no token to score");
  valid.Update(CheckTokens(state->tokens, "tokens"));
  if (valid.ok()) {
    MakeTargets(state.get());
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
    // A beginning that another one has that waits is fed once, and so counted once.
    const int64_t prompt_tokens = queued_prompts_.Added(request->queued_prompt());
    valid = Admit(*request, prompt_tokens);
    if (valid.ok()) {
      const RequestHandle handle = next_handle_++;
      request->id = handle;
      tokens_in_flight_ += request->tokens_left;
      queued_prompts_.Add(request->queued_prompt());
      CountWork(request.get(), prompt_tokens);
      submissions_.push_back(std::move(request));
      SetAdmissionGauges();
      return handle;
    }
  }
  metrics_->CountRequest(OutcomeOf(valid));
  return valid;
}

absl::Status StepLoop::Admit(const RequestState& request, int64_t prompt_tokens) {
  if (faulted_) return absl::UnavailableError("the device has failed");
  if (draining_) return absl::UnavailableError("the server is draining");
  if (absl::Status feasible = CheckFeasible(request, prompt_tokens); !feasible.ok())
    return feasible;
  absl::Status admitted = admission_.Admit(request.priority, prompt_tokens);
  if (!absl::IsResourceExhausted(admitted)) return admitted;
  const absl::Duration wait = EstimatedWait(request.priority, SizeOf(prompt_tokens));
  absl::Status refusal(admitted.code(),
                       absl::StrCat(admitted.message(), "; one that comes now would wait about ",
                                    absl::FormatDuration(wait)));
  SetRetryAfter(wait, &refusal);
  return refusal;
}

// Adds what a request that was admitted has to do.
void StepLoop::CountWork(RequestState* request, int64_t prompt_tokens) {
  const auto steps = [](int64_t tokens) {
    return std::clamp<int64_t>(tokens, 1, kMaxExpectedSteps);
  };
  request->expected_steps = steps(request->max_new_tokens);
  if (MayEndEarly(*request)) {
    request->open_steps = request->expected_steps - steps(request->min_new_tokens);
  }
  request->counted = RequestState::Counted::kWaiting;
  request->counted_prompt = prompt_tokens;
  Work& work = WorkOf(*request, &work_);
  work.AddWaiting(request->expected_steps, request->open_steps, 1);
  work.prompt_tokens += request->counted_prompt;
}

absl::Duration StepLoop::EstimatedWait(Priority priority, int size) const {
  return EstimateWait(work_, priority, size, policy_.capacity(),
                      throughput_.Costs(options_.step_time_target));
}

// Refuses what will certainly miss its deadline. Whatever runs may be cancelled the next moment, so
// of the wait only what the queue takes counts, and half of that: it is an estimate that is right
// to a factor of about two. An idle server measures nothing, so it refuses nothing: an average that
// a hiccup has spoilt would never be corrected.
absl::Status StepLoop::CheckFeasible(const RequestState& request, int64_t prompt_tokens) const {
  if (request.deadline == absl::InfiniteFuture() || admission_.empty()) return absl::OkStatus();
  // What nothing can end early takes all its tokens.
  const int64_t new_tokens = MayEndEarly(request) ? request.min_new_tokens : request.max_new_tokens;
  const int64_t per_step = request.speculation == nullptr ? 1 : request.speculation->max_run();
  WorkByClass queued = work_;
  for (ClassWork& of_class : queued) {
    for (Work& work : of_class) {
      work.running_steps = 0;
      work.running_squares = 0;
    }
  }
  const absl::Duration queue_takes =
      EstimateWait(queued, request.priority, SizeOf(prompt_tokens), policy_.capacity(),
                   throughput_.Costs(options_.step_time_target));
  const absl::Duration least =
      queue_takes / 2 + throughput_.ServiceTime(prompt_tokens, new_tokens / per_step);
  const absl::Duration left = request.deadline - request.submitted;
  if (least <= left) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("the deadline cannot be met: it is in ", absl::FormatDuration(left),
                   ", and the request would take at least ", absl::FormatDuration(least)));
}

void StepLoop::SetAdmissionGauges() {
  metrics_->SetQueued(admission_.waiting());
  metrics_->SetRunning(admission_.running());
  metrics_->SetSlots(admission_.running(), backend_->info().num_slots);
  metrics_->SetPaused(paused_);
  metrics_->SetPreempted(admission_.evicted() - parked_);
  metrics_->SetTokensInFlight(tokens_in_flight_);
  metrics_->SetEstimatedWait(EstimatedWait(Priority::kNormal, 0));
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

int64_t StepLoop::CachedTokens(const GenerationRequest& request) const {
  return sharing_.Peek(sharing_.SpaceOf(request), request.prompt);
}

StepLoop::Load StepLoop::load() const {
  absl::MutexLock lock(&mutex_);
  Load load;
  load.waiting = admission_.waiting();
  load.waiting_tokens = admission_.waiting_tokens();
  load.running = admission_.running();
  load.paused = paused_;
  load.preempted = admission_.evicted() - parked_;
  load.tokens_in_flight = tokens_in_flight_;
  load.step_time = throughput_.step();
  for (size_t i = 0; i < load.estimated_wait.size(); ++i) {
    load.estimated_wait[i] = EstimatedWait(static_cast<Priority>(i), 0);
  }
  return load;
}

}  // namespace mmfree
