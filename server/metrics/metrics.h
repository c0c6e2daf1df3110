// Every instrument of the server, in one place. Names follow the field's words with the prefix
// mmfree_; base units (seconds, bytes); histograms reach down to 0.1 ms.
#ifndef MMFREE_SERVER_METRICS_METRICS_H_
#define MMFREE_SERVER_METRICS_METRICS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prometheus {
class Registry;
}

namespace mmfree {

// Instruments of one served model. Thread-safe; each call is a few atomic operations.
class ModelMetrics {
 public:
  virtual ~ModelMetrics() = default;

  // Scheduler and step loop.
  virtual void SetQueued(int64_t requests) = 0;
  virtual void SetRunning(int64_t requests) = 0;
  virtual void SetPaused(int64_t requests) = 0;
  virtual void SetPreempted(int64_t requests) = 0;
  virtual void CountPreemptions(int64_t requests) = 0;
  virtual void SetSlots(int64_t used, int64_t total) = 0;
  virtual void SetTokensInFlight(int64_t tokens) = 0;
  virtual void SetEstimatedWait(absl::Duration time) = 0;
  // One step: rows and tokens of each kind, and how long it took.
  enum class StepKind { kPrefill, kDecode, kMixed };
  virtual void ObserveStep(StepKind kind, int64_t rows, int64_t tokens, absl::Duration time) = 0;

  // Requests. `outcome` is "eos", "length", "stop_token", "scored" or a gRPC status name in lower
  // case ("cancelled", "deadline_exceeded", "resource_exhausted", ...).
  virtual void CountRequest(absl::string_view outcome) = 0;
  virtual void CountPromptTokens(int64_t tokens) = 0;
  virtual void CountGeneratedTokens(int64_t tokens) = 0;
  // A prompt that may use the prefix cache starts: `cached` of its tokens are not computed again,
  // none for a miss. `joined`: it waited for another prompt that was being fed.
  virtual void CountPrefixLookup(int64_t cached, bool joined) = 0;
  // A row fed `proposed` tokens on trial, of which `accepted` stayed.
  virtual void CountSpeculation(int64_t proposed, int64_t accepted) = 0;
  virtual void ObserveQueueTime(absl::Duration time) = 0;
  virtual void ObserveTimeToFirstToken(absl::Duration time) = 0;
  // `tokens` tokens, each `time` after the one before it in its stream: rows that decode together
  // wait alike, so the step loop reports them together.
  virtual void ObserveInterTokenLatency(absl::Duration time, int64_t tokens) = 0;
  virtual void ObserveEndToEndLatency(absl::Duration time) = 0;
  virtual void ObserveRequestTokens(int64_t prompt_tokens, int64_t generated_tokens) = 0;
};

struct ModelInfoLabels {
  std::string model;
  std::string digest;
  std::string backend;      // "cpu", "cuda"
  std::string description;  // "avx512, 2 threads"
  // Which of several engines that serve the model; empty: the only one, and no label.
  std::string replica = {};
};

// Thread-safe.
class Metrics {
 public:
  // Registers every family in `registry`, which must outlive the metrics.
  static std::unique_ptr<Metrics> Create(prometheus::Registry* registry);
  virtual ~Metrics() = default;

  // Instruments labelled model=`info.model` and, unless empty, replica=`info.replica`; also sets
  // mmfree_model_info. The pointer lives as long as this object; the same names give the same
  // instruments.
  virtual ModelMetrics* ForModel(const ModelInfoLabels& info) = 0;

  // RPCs by method ("Generate") and gRPC status name ("OK", "INVALID_ARGUMENT").
  virtual void CountRpc(absl::string_view method, absl::string_view status) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_METRICS_H_
