#include "server/scheduler/step_loop.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

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

}  // namespace mmfree
