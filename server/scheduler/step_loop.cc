#include "server/scheduler/step_loop.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

// How often the backlogs of paused rows are looked at while nothing else runs. A row resumes at
// half its limit, so its client has that much left to read meanwhile.
constexpr absl::Duration kPausedPoll = absl::Milliseconds(5);
// Paused rows looked at in one iteration: bounds what a thousand idle readers cost the others.
constexpr size_t kPausedChecks = 256;

Policy::Options WithSlots(Policy::Options options, const BackendInfo& info) {
  options.num_slots = info.num_slots;
  options.step_token_budget = std::min(options.step_token_budget, info.max_step_tokens);
  return options;
}

int64_t FullChunk(const Policy::Options& options) {
  return std::min(options.prefill_chunk, options.step_token_budget);
}

}  // namespace

StepLoop::StepLoop(const Options& options, std::unique_ptr<Backend> backend, ModelMetrics* metrics)
    : options_(options),
      backend_(std::move(backend)),
      metrics_(metrics),
      full_chunk_(FullChunk(WithSlots(options.policy, backend_->info()))),
      admission_({Policy::Capacity(WithSlots(options.policy, backend_->info())), options.max_queue,
                  options.max_queue_tokens}),
      throughput_(full_chunk_),
      sharing_(options.prefixes, metrics),
      policy_(WithSlots(options.policy, backend_->info()),
              [this](SchedulerEntry* entry) { PreparePrompt(StateOf(entry)); }),
      current_throughput_(throughput_),
      delivery_(options.delivery_threads) {
  {
    absl::MutexLock lock(&mutex_);
    SetAdmissionGauges();
  }
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

void StepLoop::Run() {
  while (TakeInbox()) {
    const absl::Time now = options_.clock->Now();
    EnqueueSubmissions(now);
    EndCancelled(now);
    EndOverdue(now);
    CheckReaders(now);
    PlanStep(now);
    // What ended above is told now: a step can take long.
    ApplyChanges();
    delivery_.Publish();
    if (!plan_.rows.empty()) Step(now);
  }
}

// Of a request that has a slot: says from where on it is fed, unless it is to wait.
void StepLoop::PreparePrompt(RequestState* request) {
  sharing_.Prepare(request);
  if (request->held) policy_.Refile(request->prefix.joined);
  CountPrompt(request,
              request->prompt_tokens - (request->held ? request->prefix.join_at : request->fed));
  counts_changed_ = true;
  if (request->held) return;
  tokens_done_ += request->fed;
  request->tokens_left -= request->fed;
  request->generation.usage.cached_tokens = request->fed;
}

void StepLoop::ResumeReleased() {
  for (RequestState* request : sharing_.TakeReleased()) {
    PreparePrompt(request);
    if (!request->held) policy_.Unhold(request);
  }
}

void StepLoop::PlanStep(absl::Time now) {
  ResumeReleased();
  // Without decoding rows nobody's stream waits for the step, but whoever comes meanwhile does, and
  // a cancellation.
  const int64_t prompt_budget = current_throughput_.PromptBudget(
      options_.step_time_target, static_cast<int64_t>(policy_.decoding()));
  policy_.PlanStep(now, prompt_budget, &plan_);
  CountPlan();
}

// The request waits for a slot from now on, or has one, or neither counts.
void StepLoop::CountAs(RequestState* request, RequestState::Counted counted) {
  const auto add = [this, request](int count) {
    Work& work = WorkOf(*request, &work_changes_);
    if (request->counted == RequestState::Counted::kWaiting) {
      work.AddWaiting(request->expected_steps, request->open_steps, count);
    } else if (request->counted == RequestState::Counted::kRunning) {
      work.AddRunning(request->expected_steps, count);
    }
  };
  add(-1);
  request->counted = counted;
  add(1);
}

// So many tokens of the request's prompt are still to be fed for it.
void StepLoop::CountPrompt(RequestState* request, int64_t tokens_left) {
  const RequestState::Counted counted = request->counted;
  CountAs(request, RequestState::Counted::kNot);
  WorkOf(*request, &work_changes_).prompt_tokens -= request->counted_prompt;
  request->counted_prompt = tokens_left;
  WorkOf(*request, &work_changes_).prompt_tokens += tokens_left;
  CountAs(request, counted);
}

// What the plan moves between the counts.
void StepLoop::CountPlan() {
  const auto started = [this](SchedulerEntry* entry) {
    ++changes_.running[static_cast<size_t>(entry->priority)];
    RequestState* const request = StateOf(entry);
    CountAs(request, RequestState::Counted::kNot);
    request->expected_steps -=
        static_cast<int64_t>((1 - current_throughput_.used()) *
                             static_cast<double>(std::exchange(request->open_steps, 0)));
    CountAs(request, RequestState::Counted::kRunning);
  };
  for (const Policy::Preemption& preemption : plan_.preempted) {
    SchedulerEntry* const entry = preemption.entry;
    --changes_.running[static_cast<size_t>(entry->priority)];
    ++changes_.evicted[static_cast<size_t>(entry->priority)];
    // It was paused, and so left out already.
    if (entry->phase == Phase::kParked) continue;
    CountAs(StateOf(entry), RequestState::Counted::kWaiting);
  }
  for (SchedulerEntry* entry : plan_.resumed) {
    --changes_.evicted[static_cast<size_t>(entry->priority)];
    started(entry);
  }
  for (SchedulerEntry* entry : plan_.admitted) {
    --changes_.waiting[static_cast<size_t>(entry->priority)];
    dequeued_.push_back(StateOf(entry));
    started(entry);
  }
  if (!plan_.preempted.empty()) {
    metrics_->CountPreemptions(static_cast<int64_t>(plan_.preempted.size()));
  }
  counts_changed_ |= !plan_.preempted.empty() || !plan_.resumed.empty() || !plan_.admitted.empty();
}

// Returns false when the loop is to stop.
bool StepLoop::TakeInbox() {
  const auto something_came = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !submissions_.empty() || !cancellations_.empty() || stopping_;
  };
  absl::MutexLock lock(&mutex_);
  if (plan_.rows.empty()) {
    const absl::Condition condition(&something_came);
    if (policy_.empty()) {
      mutex_.Await(condition);
    } else {
      mutex_.AwaitWithTimeout(condition, kPausedPoll);
    }
  }
  new_submissions_.swap(submissions_);
  new_cancellations_.swap(cancellations_);
  end_all_at_ = drain_deadline_;
  tokens_in_flight_ -= std::exchange(tokens_done_, 0);
  throughput_ = current_throughput_;
  metrics_->SetTokensInFlight(tokens_in_flight_);
  return !stopping_;
}

void StepLoop::EnqueueSubmissions(absl::Time now) {
  for (std::unique_ptr<RequestState>& request : new_submissions_) {
    policy_.Enqueue(request.get(), now);
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

void StepLoop::CheckReaders(absl::Time now) {
  const auto check_some = [this, now](auto entries, size_t* cursor) {
    const size_t checks = std::min(entries().size(), kPausedChecks);
    for (size_t i = 0; i < checks; ++i) {
      if (*cursor >= entries().size()) *cursor = 0;
      // When one leaves, another takes its place in the list.
      if (!CheckReader(StateOf(entries()[*cursor]), now)) ++*cursor;
    }
  };
  check_some([this] { return policy_.paused(); }, &paused_cursor_);
  check_some([this] { return policy_.parked(); }, &parked_cursor_);
}

bool StepLoop::CheckReader(RequestState* request, absl::Time now) {
  const int64_t limit = static_cast<int64_t>(options_.max_stream_backlog);
  const int64_t backlog = Backlog(*request);
  if (backlog <= limit / 2) {
    request->until_backlog_check = limit - backlog;
    Resume(request);
    return true;
  }
  if (backlog < request->least_backlog) {
    request->least_backlog = backlog;
    request->last_read = now;
  } else if (Elapsed(request->last_read, now) >= options_.stalled_reader_timeout) {
    Fail(request,
         absl::CancelledError(absl::StrCat("the client read nothing for ",
                                           absl::FormatDuration(options_.stalled_reader_timeout))),
         now);
    return true;
  }
  return false;
}

void StepLoop::Resume(RequestState* request) {
  policy_.Resume(request);
  CountAs(request, request->phase == Phase::kDecode ? RequestState::Counted::kRunning
                                                    : RequestState::Counted::kWaiting);
}

void StepLoop::Pause(RequestState* request) {
  CountAs(request, RequestState::Counted::kNot);
  policy_.Pause(request);
}

// Makes what started and ended known to the others: before any sink hears of an end, so that its
// place is free and the gauges are right when it does.
void StepLoop::ApplyChanges() {
  const int64_t parked = static_cast<int64_t>(policy_.parked().size());
  const int64_t paused = static_cast<int64_t>(policy_.paused().size()) + parked;
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < work_.size(); ++i) {
    for (size_t size = 0; size < work_[i].size(); ++size) work_[i][size] += work_changes_[i][size];
  }
  work_changes_ = WorkByClass();
  metrics_->SetEstimatedWait(EstimatedWait(Priority::kNormal, 0));
  if (!counts_changed_ && parked == parked_ && paused == paused_) return;
  for (const RequestState* request : dequeued_) {
    changes_.waiting_tokens -= queued_prompts_.Remove(request->queued_prompt());
  }
  dequeued_.clear();
  admission_.Apply(changes_);
  tokens_in_flight_ -= std::exchange(tokens_done_, 0);
  parked_ = parked;
  paused_ = paused;
  changes_ = AdmissionControl::Counts();
  counts_changed_ = false;
  SetAdmissionGauges();
}

}  // namespace mmfree
