// The facade the RPC layer talks to: one served model with its scheduler and backend.
#ifndef MMFREE_SERVER_ENGINE_ENGINE_H_
#define MMFREE_SERVER_ENGINE_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/backends/backend.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/metrics/session_metrics.h"
#include "server/model/model.h"
#include "server/prefix_cache/prefix_cache.h"
#include "server/sampling/constraint.h"
#include "server/scheduler/request.h"
#include "server/sessions/device_pool.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

// Thread-safe. Owns its backend, step thread and delivery threads. Destruction cancels what runs
// and joins them; every sink has then been finished.
class Engine {
 public:
  struct Options {
    std::string model_name;
    std::string replica;                   // which engine of a group, for the metrics; empty: none
    int32_t max_batch = 0;                 // rows of one step; 0: all slots
    int32_t max_queue = 1024;              // requests waiting for a slot
    int64_t max_queue_tokens = 4'000'000;  // prompt tokens waiting
    int32_t prefill_chunk = 256;           // prompt tokens of one request in one step, at most
    int32_t step_token_budget = 1024;      // tokens of one step over all rows
    size_t max_stream_backlog = 256;  // tokens a client may lag behind before its row is paused
    absl::Duration stalled_reader_timeout =
        absl::Seconds(60);                                     // then a paused request is cancelled
    absl::Duration step_time_target = absl::Milliseconds(50);  // as StepLoop::Options
    int32_t delivery_threads = 1;
    PrefixCache* prefix_cache = nullptr;        // of any number of engines; must outlive them
    int32_t prefix_cache_interval = 256;        // as PrefixSharing::Options
    SessionMetrics* session_metrics = nullptr;  // of device_pools(); null: none
    const Clock* clock = Clock::Real();
    // Called once with false, when the engine becomes unhealthy: by the step thread after a device
    // fault, by Drain's caller before admission stops. Must not call the engine.
    std::function<void(bool healthy)> health_listener;
  };

  // `metrics` must outlive the engine. INVALID_ARGUMENT names an option out of range.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(Options options,
                                                        std::shared_ptr<const Model> model,
                                                        std::shared_ptr<const Tokenizer> tokenizer,
                                                        std::unique_ptr<Backend> backend,
                                                        Metrics* metrics);
  virtual ~Engine() = default;

  // Queues a request. On OK the sink is finished exactly once, later, from a delivery thread
  // (possibly before Submit returns). On an error the sink is never called: RESOURCE_EXHAUSTED
  // (queue full; TakeRetryAfter says when to try again), DEADLINE_EXCEEDED (already passed),
  // UNAVAILABLE (draining or device fault), INVALID_ARGUMENT (a request that validation should have
  // refused).
  virtual absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                               std::shared_ptr<GenerationSink> sink) = 0;
  virtual absl::StatusOr<RequestHandle> Score(ScoreRequest request,
                                              std::shared_ptr<ScoreSink> sink) = 0;

  // Tokens of the request's prompt that the prefix cache would spare it if it started now.
  virtual int64_t CachedTokens(const GenerationRequest& /*request*/) const { return 0; }

  // Ends a request with CANCELLED within one step and frees its slot. No effect on an unknown
  // handle or one that has finished.
  virtual void Cancel(RequestHandle handle) = 0;

  // Stops admitting (UNAVAILABLE), lets what was admitted finish until `deadline`, cancels the rest
  // with UNAVAILABLE. Returns when nothing is left: every sink is finished. Idempotent; a later
  // call may bring the deadline forward. Not from a sink.
  virtual void Drain(absl::Time deadline) = 0;

  // A device fault or a drain makes an engine unhealthy for good.
  virtual bool healthy() const = 0;

  struct Load {
    int32_t queued = 0;     // waiting for their first slot
    int32_t running = 0;    // holding a slot
    int32_t paused = 0;     // skipping steps because their reader lags, with or without a slot
    int32_t preempted = 0;  // started, and waiting for a slot again
    int64_t queued_tokens = 0;
    int64_t tokens_in_flight = 0;  // that admitted requests may still take
    absl::Duration step_time;      // average; of several devices the longest
    int32_t slots_used = 0;
    int32_t slots_total = 0;
    absl::Duration estimated_wait;  // of a request of normal priority that comes now
  };
  virtual Load load() const = 0;

  // What it admits at once at most, whatever else it does: more can never be taken.
  struct Limits {
    int64_t requests = 0;       // running and queued
    int64_t queue_tokens = 0;   // prompt tokens of those that are queued
    int64_t prompt_tokens = 0;  // of one request
  };
  virtual Limits limits() const = 0;

  // What keeps states of sessions on its devices; empty: nothing does. They stay valid, and take
  // nothing any longer, when the engine is gone.
  virtual std::vector<std::shared_ptr<DevicePool>> device_pools() const { return {}; }

  virtual const std::string& model_name() const = 0;
  virtual const Model& model() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const BackendInfo& backend_info() const = 0;
  // Of this model's vocabulary.
  virtual ConstraintCache* constraints() const = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_ENGINE_ENGINE_H_
