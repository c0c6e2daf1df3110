#include "server/metrics/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace mmfree {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

// Short times: a step, the wait between two tokens. A step of a small model takes 0.1 ms.
Buckets StepSeconds() {
  return {0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075,
          0.01,   0.015,  0.02,   0.03,   0.05,    0.075, 0.1,    0.2,   0.5,   1.0,   2.5};
}

// Times that include waiting: in the queue, to the first token, of a whole request.
Buckets RequestSeconds() {
  return {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,  0.2,
          0.5,    1.0,    2.0,    5.0,   10.0,  20.0,  30.0, 60.0, 120., 300., 600.};
}

Buckets PowersOfTwo(int last) {
  Buckets buckets;
  for (int i = 0; i <= last; ++i) buckets.push_back(static_cast<double>(int64_t{1} << i));
  return buckets;
}

std::string CompilerName() {
#if defined(__clang__)
  return absl::StrCat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#elif defined(__GNUC__)
  return absl::StrCat("gcc ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

// A histogram whose boundaries are at hand, so that many equal observations cost one.
class BulkHistogram {
 public:
  BulkHistogram(Family<Histogram>& family, const prometheus::Labels& labels, Buckets buckets)
      : buckets_(std::move(buckets)), histogram_(&family.Add(labels, buckets_)) {}

  void Observe(double value) { histogram_->Observe(value); }

  void Observe(double value, int64_t count) {
    if (count == 1) return histogram_->Observe(value);
    thread_local std::vector<double> increments;
    increments.assign(buckets_.size() + 1, 0.0);
    const size_t bucket =
        std::lower_bound(buckets_.begin(), buckets_.end(), value) - buckets_.begin();
    increments[bucket] = static_cast<double>(count);
    histogram_->ObserveMultiple(increments, value * static_cast<double>(count));
  }

 private:
  const Buckets buckets_;
  Histogram* const histogram_;
};

// Every family, registered once.
struct Families {
  explicit Families(prometheus::Registry& registry);

  Family<Gauge>& build_info;
  Family<Gauge>& model_info;
  Family<Counter>& rpcs;
  Family<Counter>& requests;
  Family<Gauge>& waiting;
  Family<Gauge>& running;
  Family<Gauge>& paused;
  Family<Gauge>& preempted;
  Family<Counter>& preemptions;
  Family<Gauge>& tokens_in_flight;
  Family<Gauge>& estimated_wait;
  Family<Gauge>& slots_used;
  Family<Gauge>& slots;
  Family<Counter>& prompt_tokens;
  Family<Counter>& generation_tokens;
  Family<Counter>& prefix_hits;
  Family<Counter>& prefix_misses;
  Family<Counter>& prefix_cached_tokens;
  Family<Counter>& prefix_joins;
  Family<Counter>& speculative_rows;
  Family<Counter>& speculative_proposed;
  Family<Counter>& speculative_accepted;
  Family<Histogram>& queue_time;
  Family<Histogram>& time_to_first_token;
  Family<Histogram>& inter_token_latency;
  Family<Histogram>& e2e_latency;
  Family<Histogram>& request_prompt_tokens;
  Family<Histogram>& request_generation_tokens;
  Family<Histogram>& step_duration;
  Family<Histogram>& step_rows;
  Family<Histogram>& step_tokens;
};

Family<Counter>& AddCounter(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
Family<Gauge>& AddGauge(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
Family<Histogram>& AddHistogram(prometheus::Registry& registry, const char* name,
                                const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

Families::Families(prometheus::Registry& r)
    : build_info(AddGauge(r, "mmfree_build_info",
                          "Always 1; the labels name the server's version and its compiler.")),
      model_info(AddGauge(r, "mmfree_model_info",
                          "Always 1 for each served model; the labels name its digest (SHA-256 of "
                          "the weights) and its backend.")),
      rpcs(AddCounter(r, "mmfree_rpcs_total",
                      "RPCs that ended, by method and gRPC status. Unit: RPCs.")),
      requests(
          AddCounter(r, "mmfree_requests_total",
                     "Requests that ended, each counted once, by outcome: a finish reason "
                     "(eos, length, stop_token), scored, or a gRPC status in lower case, which "
                     "includes refusals. Unit: requests.")),
      waiting(AddGauge(r, "mmfree_num_requests_waiting",
                       "Requests admitted that wait for a state slot. Unit: requests.")),
      running(AddGauge(r, "mmfree_num_requests_running",
                       "Requests that hold a state slot, paused ones included. Unit: requests.")),
      paused(AddGauge(r, "mmfree_num_requests_paused",
                      "Running requests that skip steps because their reader lags. Unit: "
                      "requests.")),
      preempted(AddGauge(r, "mmfree_num_requests_preempted",
                         "Requests whose state was moved out of its slot for another request, and "
                         "that wait for a slot again. Unit: requests.")),
      preemptions(AddCounter(r, "mmfree_num_preemptions_total",
                             "States moved out of their slots for requests of a higher class, or "
                             "because their reader lagged. Unit: preemptions.")),
      tokens_in_flight(AddGauge(r, "mmfree_tokens_in_flight",
                                "Tokens that admitted requests may still take: of their prompts, "
                                "and max_new_tokens. Unit: tokens.")),
      estimated_wait(AddGauge(r, "mmfree_estimated_wait_seconds",
                              "How long a request of normal priority that arrives now would wait "
                              "for its first step, in seconds.")),
      slots_used(AddGauge(r, "mmfree_state_slots_used", "State slots in use. Unit: slots.")),
      slots(AddGauge(r, "mmfree_state_slots", "State slots that the backend has. Unit: slots.")),
      prompt_tokens(AddCounter(r, "mmfree_prompt_tokens_total",
                               "Prompt and scored tokens fed to the model. Unit: tokens.")),
      generation_tokens(AddCounter(r, "mmfree_generation_tokens_total",
                                   "Tokens generated and emitted. Unit: tokens.")),
      prefix_hits(AddCounter(r, "mmfree_prefix_cache_hits_total",
                             "Requests that started from a state of the prefix cache, or of "
                             "another prompt that was being fed. Unit: requests.")),
      prefix_misses(AddCounter(r, "mmfree_prefix_cache_misses_total",
                               "Requests that could have used the prefix cache and found nothing "
                               "in it. Unit: requests.")),
      prefix_cached_tokens(AddCounter(r, "mmfree_prefix_cache_cached_tokens_total",
                                      "Prompt tokens that were not computed again because of "
                                      "hits. Unit: tokens.")),
      prefix_joins(AddCounter(r, "mmfree_prefix_cache_joins_total",
                              "Requests that waited for a prefix which another request was "
                              "feeding. Unit: requests.")),
      speculative_rows(AddCounter(r, "mmfree_speculative_rows_total",
                                  "Rows of a step that fed proposed tokens. Unit: rows.")),
      speculative_proposed(AddCounter(r, "mmfree_speculative_proposed_tokens_total",
                                      "Tokens proposed by prompt lookup and fed on trial. "
                                      "Unit: tokens.")),
      speculative_accepted(AddCounter(r, "mmfree_speculative_accepted_tokens_total",
                                      "Of these, those that saved a step. Unit: tokens.")),
      queue_time(AddHistogram(r, "mmfree_request_queue_time_seconds",
                              "From a request's submission to the first step that has it, in "
                              "seconds.")),
      time_to_first_token(AddHistogram(r, "mmfree_time_to_first_token_seconds",
                                       "From a request's submission to its first emitted token, "
                                       "in seconds.")),
      inter_token_latency(AddHistogram(r, "mmfree_inter_token_latency_seconds",
                                       "Between two consecutive emitted tokens of one request, in "
                                       "seconds.")),
      e2e_latency(AddHistogram(r, "mmfree_e2e_request_latency_seconds",
                               "From a request's submission to its end, whatever the outcome, in "
                               "seconds.")),
      request_prompt_tokens(AddHistogram(r, "mmfree_request_prompt_tokens",
                                         "Prompt (or scored) tokens of a request that ended. "
                                         "Unit: tokens.")),
      request_generation_tokens(AddHistogram(r, "mmfree_request_generation_tokens",
                                             "Emitted tokens of a request that ended. Unit: "
                                             "tokens.")),
      step_duration(AddHistogram(r, "mmfree_step_duration_seconds",
                                 "One backend step by kind (prefill: only prompt chunks, decode: "
                                 "only decoding rows, mixed), in seconds.")),
      step_rows(AddHistogram(r, "mmfree_step_batch_size",
                             "Rows (sequences) that advanced in one step. Unit: rows.")),
      step_tokens(AddHistogram(r, "mmfree_step_tokens",
                               "Tokens fed in one step over all its rows. Unit: tokens.")) {}

constexpr absl::string_view kKnownOutcomes[] = {
    "eos",         "length",
    "stop_token",  "scored",
    "cancelled",   "deadline_exceeded",
    "internal",    "resource_exhausted",
    "unavailable",
};

prometheus::Labels ModelLabels(const ModelInfoLabels& info) {
  prometheus::Labels labels = {{"model", info.model}};
  if (!info.replica.empty()) labels.emplace("replica", info.replica);
  return labels;
}

class ModelMetricsImpl final : public ModelMetrics {
 public:
  ModelMetricsImpl(Families& families, const ModelInfoLabels& info)
      : model_label_(ModelLabels(info)),
        requests_(families.requests),
        waiting_(families.waiting.Add(model_label_)),
        running_(families.running.Add(model_label_)),
        paused_(families.paused.Add(model_label_)),
        preempted_(families.preempted.Add(model_label_)),
        preemptions_(families.preemptions.Add(model_label_)),
        tokens_in_flight_(families.tokens_in_flight.Add(model_label_)),
        estimated_wait_(families.estimated_wait.Add(model_label_)),
        slots_used_(families.slots_used.Add(model_label_)),
        slots_(families.slots.Add(model_label_)),
        prompt_tokens_(families.prompt_tokens.Add(model_label_)),
        generation_tokens_(families.generation_tokens.Add(model_label_)),
        prefix_hits_(families.prefix_hits.Add(model_label_)),
        prefix_misses_(families.prefix_misses.Add(model_label_)),
        prefix_cached_tokens_(families.prefix_cached_tokens.Add(model_label_)),
        prefix_joins_(families.prefix_joins.Add(model_label_)),
        speculative_rows_(families.speculative_rows.Add(model_label_)),
        speculative_proposed_(families.speculative_proposed.Add(model_label_)),
        speculative_accepted_(families.speculative_accepted.Add(model_label_)),
        queue_time_(families.queue_time.Add(model_label_, RequestSeconds())),
        time_to_first_token_(families.time_to_first_token.Add(model_label_, RequestSeconds())),
        inter_token_latency_(families.inter_token_latency, model_label_, StepSeconds()),
        e2e_latency_(families.e2e_latency.Add(model_label_, RequestSeconds())),
        request_prompt_tokens_(families.request_prompt_tokens.Add(model_label_, PowersOfTwo(20))),
        request_generation_tokens_(
            families.request_generation_tokens.Add(model_label_, PowersOfTwo(20))),
        step_rows_(families.step_rows.Add(model_label_, PowersOfTwo(13))),
        step_tokens_(families.step_tokens.Add(model_label_, PowersOfTwo(16))) {
    for (const char* kind : {"prefill", "decode", "mixed"}) {
      prometheus::Labels labels = model_label_;
      labels.emplace("kind", kind);
      step_duration_.push_back(&families.step_duration.Add(labels, StepSeconds()));
    }
    // Present from the start, so that a rate over the first failure is not lost.
    for (absl::string_view outcome : kKnownOutcomes) Outcome(outcome);
  }

  void SetQueued(int64_t requests) override { waiting_.Set(static_cast<double>(requests)); }
  void SetRunning(int64_t requests) override { running_.Set(static_cast<double>(requests)); }
  void SetPaused(int64_t requests) override { paused_.Set(static_cast<double>(requests)); }
  void SetPreempted(int64_t requests) override { preempted_.Set(static_cast<double>(requests)); }
  void CountPreemptions(int64_t requests) override {
    preemptions_.Increment(static_cast<double>(requests));
  }
  void SetTokensInFlight(int64_t tokens) override {
    tokens_in_flight_.Set(static_cast<double>(tokens));
  }
  void SetEstimatedWait(absl::Duration time) override {
    estimated_wait_.Set(absl::ToDoubleSeconds(time));
  }
  void SetSlots(int64_t used, int64_t total) override {
    slots_used_.Set(static_cast<double>(used));
    slots_.Set(static_cast<double>(total));
  }

  void ObserveStep(StepKind kind, int64_t rows, int64_t tokens, absl::Duration time) override {
    step_duration_[static_cast<size_t>(kind)]->Observe(absl::ToDoubleSeconds(time));
    step_rows_.Observe(static_cast<double>(rows));
    step_tokens_.Observe(static_cast<double>(tokens));
  }

  void CountRequest(absl::string_view outcome) override { Outcome(outcome).Increment(); }
  void CountPromptTokens(int64_t tokens) override {
    prompt_tokens_.Increment(static_cast<double>(tokens));
  }
  void CountGeneratedTokens(int64_t tokens) override {
    generation_tokens_.Increment(static_cast<double>(tokens));
  }
  void CountPrefixLookup(int64_t cached, bool joined) override {
    (cached > 0 ? prefix_hits_ : prefix_misses_).Increment();
    if (cached > 0) prefix_cached_tokens_.Increment(static_cast<double>(cached));
    if (joined) prefix_joins_.Increment();
  }
  void CountSpeculation(int64_t proposed, int64_t accepted) override {
    speculative_rows_.Increment();
    speculative_proposed_.Increment(static_cast<double>(proposed));
    speculative_accepted_.Increment(static_cast<double>(accepted));
  }
  void ObserveQueueTime(absl::Duration time) override {
    queue_time_.Observe(absl::ToDoubleSeconds(time));
  }
  void ObserveTimeToFirstToken(absl::Duration time) override {
    time_to_first_token_.Observe(absl::ToDoubleSeconds(time));
  }
  void ObserveInterTokenLatency(absl::Duration time, int64_t tokens) override {
    inter_token_latency_.Observe(absl::ToDoubleSeconds(time), tokens);
  }
  void ObserveEndToEndLatency(absl::Duration time) override {
    e2e_latency_.Observe(absl::ToDoubleSeconds(time));
  }
  void ObserveRequestTokens(int64_t prompt_tokens, int64_t generated_tokens) override {
    request_prompt_tokens_.Observe(static_cast<double>(prompt_tokens));
    request_generation_tokens_.Observe(static_cast<double>(generated_tokens));
  }

 private:
  Counter& Outcome(absl::string_view outcome) {
    prometheus::Labels labels = model_label_;
    labels.emplace("outcome", std::string(outcome));
    return requests_.Add(labels);
  }

  const prometheus::Labels model_label_;
  Family<Counter>& requests_;
  Gauge& waiting_;
  Gauge& running_;
  Gauge& paused_;
  Gauge& preempted_;
  Counter& preemptions_;
  Gauge& tokens_in_flight_;
  Gauge& estimated_wait_;
  Gauge& slots_used_;
  Gauge& slots_;
  Counter& prompt_tokens_;
  Counter& generation_tokens_;
  Counter& prefix_hits_;
  Counter& prefix_misses_;
  Counter& prefix_cached_tokens_;
  Counter& prefix_joins_;
  Counter& speculative_rows_;
  Counter& speculative_proposed_;
  Counter& speculative_accepted_;
  Histogram& queue_time_;
  Histogram& time_to_first_token_;
  BulkHistogram inter_token_latency_;
  Histogram& e2e_latency_;
  Histogram& request_prompt_tokens_;
  Histogram& request_generation_tokens_;
  Histogram& step_rows_;
  Histogram& step_tokens_;
  std::vector<Histogram*> step_duration_;  // by StepKind
};

class MetricsImpl final : public Metrics {
 public:
  explicit MetricsImpl(prometheus::Registry* registry) : families_(*registry) {
    families_.build_info.Add({{"version", MMFREE_VERSION}, {"compiler", CompilerName()}}).Set(1);
  }

  ModelMetrics* ForModel(const ModelInfoLabels& info) override {
    absl::MutexLock lock(&mutex_);
    PerModel& model = models_[ModelLabels(info)];
    if (model.instruments == nullptr) {
      model.instruments = std::make_unique<ModelMetricsImpl>(families_, info);
    }
    // A model loaded anew under its name may have another digest or backend.
    if (model.info != nullptr) families_.model_info.Remove(model.info);
    prometheus::Labels labels = ModelLabels(info);
    labels.insert(
        {{"digest", info.digest}, {"backend", info.backend}, {"description", info.description}});
    model.info = &families_.model_info.Add(labels);
    model.info->Set(1);
    return model.instruments.get();
  }

  void CountRpc(absl::string_view method, absl::string_view status) override {
    families_.rpcs.Add({{"method", std::string(method)}, {"status", std::string(status)}})
        .Increment();
  }

 private:
  struct PerModel {
    std::unique_ptr<ModelMetricsImpl> instruments;
    Gauge* info = nullptr;
  };

  Families families_;
  absl::Mutex mutex_;
  std::map<prometheus::Labels, PerModel> models_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Metrics> Metrics::Create(prometheus::Registry* registry) {
  return std::make_unique<MetricsImpl>(registry);
}

}  // namespace mmfree
