// The thread that steps the backend: it carries out the policy's decisions and turns sampled tokens
// into streams and results.
#ifndef MMFREE_SERVER_SCHEDULER_STEP_LOOP_H_
#define MMFREE_SERVER_SCHEDULER_STEP_LOOP_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/backends/backend.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/scheduler/admission_control.h"
#include "server/scheduler/delivery.h"
#include "server/scheduler/policy.h"
#include "server/scheduler/prefix_sharing.h"
#include "server/scheduler/request.h"
#include "server/scheduler/request_state.h"
#include "server/scheduler/throughput.h"
#include "server/scheduler/work_ahead.h"

namespace mmfree {

// Owns its backend, the step thread and the delivery threads. The public methods are thread-safe.
//
// One iteration: take what was submitted and cancelled (one lock), end what is cancelled or past
// its deadline, resume paused rows whose readers caught up, plan, move states, step the backend,
// hand tokens and ends over to the delivery threads (one lock each). With nothing to run the thread
// sleeps until something is submitted; while rows are paused it looks at their backlogs every few
// milliseconds.
class StepLoop {
 public:
  struct Options {
    Policy::Options policy;  // num_slots is taken from the backend
    int32_t max_queue = 1024;
    int64_t max_queue_tokens = 4'000'000;
    size_t max_stream_backlog = 256;  // tokens
    // A paused request whose client takes nothing for this long is ended with CANCELLED.
    absl::Duration stalled_reader_timeout = absl::Seconds(60);
    // Prompts beside decoding rows may make a step this long, or twice as long as it is without.
    absl::Duration step_time_target = absl::Milliseconds(50);
    int32_t delivery_threads = 1;
    int64_t vocab_size = 0;
    PrefixSharing::Options prefixes;
    // Of the backend's resident slots; null: it has none. Must outlive the loop.
    DevicePool* device_pool = nullptr;
    const Clock* clock = Clock::Real();
    std::function<void()> fault_listener;  // called once, by the step thread
  };

  // `metrics` must outlive the loop.
  StepLoop(const Options& options, std::unique_ptr<Backend> backend, ModelMetrics* metrics);
  // Ends what is left with UNAVAILABLE and joins the threads.
  ~StepLoop();
  StepLoop(const StepLoop&) = delete;
  StepLoop& operator=(const StepLoop&) = delete;

  // As the methods of Engine.
  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink);
  absl::StatusOr<RequestHandle> Submit(ScoreRequest request, std::shared_ptr<ScoreSink> sink);
  void Cancel(RequestHandle handle);
  void Drain(absl::Time deadline);
  int64_t CachedTokens(const GenerationRequest& request) const;

  struct Load {
    int64_t waiting = 0;  // for their first slot
    int64_t waiting_tokens = 0;
    int64_t running = 0;    // each holds one slot
    int64_t paused = 0;     // of the running and the evicted, those whose reader lags
    int64_t preempted = 0;  // started, and waiting for a slot again
    int64_t tokens_in_flight = 0;
    absl::Duration step_time;
    // Of one that comes now with a prompt of one chunk, by class.
    std::array<absl::Duration, kNumPriorities> estimated_wait;
  };
  Load load() const;

  // Requests that can hold a slot at once.
  int32_t capacity() const { return policy_.capacity(); }

  const BackendInfo& backend_info() const { return backend_->info(); }

 private:
  // Submission: any thread.
  absl::StatusOr<RequestHandle> SubmitState(std::unique_ptr<RequestState> request,
                                            absl::Status valid);
  absl::Status CheckTokens(absl::Span<const int32_t> tokens, absl::string_view what) const;
  // `prompt_tokens`: those that it adds to what waits to be fed.
  absl::Status Admit(const RequestState& request, int64_t prompt_tokens)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckFeasible(const RequestState& request, int64_t prompt_tokens) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountWork(RequestState* request, int64_t prompt_tokens)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int SizeOf(int64_t prompt_tokens) const { return PromptSize(prompt_tokens, full_chunk_); }
  // Where it is counted.
  Work& WorkOf(const RequestState& request, WorkByClass* work) const {
    return (*work)[static_cast<size_t>(request.priority)][SizeOf(request.counted_prompt)];
  }
  // Of a request whose prompt is of this size.
  absl::Duration EstimatedWait(Priority priority, int size) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetAdmissionGauges() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // The rest is the step thread's: an iteration,
  void Run();
  bool TakeInbox();
  void EnqueueSubmissions(absl::Time now);
  void EndCancelled(absl::Time now);
  void EndOverdue(absl::Time now);
  int64_t Backlog(const RequestState& request) const;
  void CheckReaders(absl::Time now);
  // Whether the request's reader caught up, so that it left `readers`, or was given up.
  bool CheckReader(RequestState* request, absl::Time now);
  void PreparePrompt(RequestState* request);
  void ResumeReleased();
  void PlanStep(absl::Time now);
  void CountPlan();
  void CountAs(RequestState* request, RequestState::Counted counted);
  void CountPrompt(RequestState* request, int64_t tokens_left);
  void Resume(RequestState* request);
  void Pause(RequestState* request);
  void ApplyChanges();

  // a step,
  void Step(absl::Time start);
  absl::Status TryStep(absl::Time start);
  absl::Status MoveStates(absl::Time start);
  absl::Status InitializeSlot(RequestState* request);
  void CaptureState(RequestState* request);
  void ReadFinalState(RequestState* request, int64_t fed, std::vector<int32_t> pending);
  // Keeps the state that the context goes on from should its stop condition cut the output.
  void HoldFinalState(RequestState* request);
  absl::Status CheckOutput() const;
  void HandleOutput(absl::Time now);
  void EmitRow(RequestState* request, const StepRow& row, absl::Span<const SampledToken> inner,
               const SampledToken& last, absl::Time now);
  absl::Status TakeBackRejected(RequestState* request);
  void ListAlternatives(RequestState* request, bool last_chunk, StepRow* row);
  void HandleAlternatives(RequestState* request, absl::Span<const SampledToken> inner,
                          const SampledToken& last, int64_t first);
  void HandleScores(RequestState* request, absl::Span<const TokenScore> scores, int64_t first);
  void Emit(RequestState* request, const SampledToken& token, absl::Time now);
  void ReportInterToken();
  void HandleFault(const absl::Status& fault, absl::Time now);

  // and the ends of requests.
  void FinishGeneration(RequestState* request, FinishReason reason, int32_t matched,
                        absl::Time now);
  void FinishScore(RequestState* request, absl::Time now);
  void Fail(RequestState* request, const absl::Status& status, absl::Time now);
  void FailPlanned(const absl::Status& status, absl::Time now);
  void FailAll(const absl::Status& status, absl::Time now);
  void End(RequestState* request, absl::string_view outcome, absl::Time now);
  // A status as a value of the metrics' label `outcome`.
  static std::string OutcomeOf(const absl::Status& status);

  const Options options_;
  const std::unique_ptr<Backend> backend_;
  ModelMetrics* const metrics_;
  const int64_t full_chunk_;  // prompt tokens of one request in one step at most

  // The inbox.
  mutable absl::Mutex mutex_;
  std::vector<std::unique_ptr<RequestState>> submissions_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestHandle> cancellations_ ABSL_GUARDED_BY(mutex_);
  AdmissionControl admission_ ABSL_GUARDED_BY(mutex_);
  QueuedPrompts queued_prompts_ ABSL_GUARDED_BY(mutex_);  // of those that wait for their first slot
  WorkByClass work_ ABSL_GUARDED_BY(mutex_);              // of the admitted requests
  RequestHandle next_handle_ ABSL_GUARDED_BY(mutex_) = 1;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time drain_deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool faulted_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t tokens_in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  // The step thread's last word, for load().
  Throughput throughput_ ABSL_GUARDED_BY(mutex_);
  int64_t paused_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t parked_ ABSL_GUARDED_BY(mutex_) = 0;

  // The step thread's.
  PrefixSharing sharing_;  // its SpaceOf and Peek: any thread's
  Policy policy_;
  Policy::Plan plan_;
  absl::flat_hash_map<RequestHandle, std::unique_ptr<RequestState>> requests_;
  std::vector<std::unique_ptr<RequestState>> new_submissions_;
  std::vector<RequestHandle> new_cancellations_;
  std::vector<SchedulerEntry*> expired_;
  absl::Time end_all_at_ = absl::InfiniteFuture();  // drain_deadline_ as last taken
  bool broken_ = false;                             // the backend is; everything ends
  // Not yet applied to what the lock guards.
  AdmissionControl::Counts changes_;
  WorkByClass work_changes_;
  std::vector<RequestState*> dequeued_;  // they do not wait for their first slot any longer
  int64_t tokens_done_ = 0;
  bool counts_changed_ = false;
  Throughput current_throughput_;
  size_t paused_cursor_ = 0;
  size_t parked_cursor_ = 0;
  std::vector<StepRow> rows_;
  StepOutput output_;
  int64_t emitted_ = 0;             // in this step
  int64_t proposed_ = 0;            // tokens that its rows feed on trial
  absl::Duration inter_token_gap_;  // of inter_token_count_ tokens of this step, not yet reported
  int64_t inter_token_count_ = 0;

  Delivery delivery_;
  std::thread thread_;  // last: it uses everything above
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_STEP_LOOP_H_
