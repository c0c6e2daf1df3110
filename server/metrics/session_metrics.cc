#include "server/metrics/session_metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <map>
#include <string>
#include <utility>

namespace mmfree {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

constexpr const char* kOperations[] = {"read", "read_checkpoint", "commit", "delete",
                                       "list", "remove_expired",  "probe"};
constexpr const char* kOutcomes[] = {"ok", "refused", "unavailable", "data_loss"};
constexpr const char* kErrors[] = {"unavailable", "data_loss"};

Family<Gauge>& AddGauge(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
Family<Counter>& AddCounter(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

class SessionMetricsImpl final : public SessionMetrics {
 public:
  explicit SessionMetricsImpl(prometheus::Registry& r)
      : busy_(AddGauge(r, "mmfree_sessions_busy", "Sessions with a running turn. Unit: sessions.")
                  .Add({})),
        stored_(AddGauge(r, "mmfree_sessions_stored",
                         "Sessions in a store of this server's own, at the last look. Unit: "
                         "sessions.")
                    .Add({})),
        lost_(AddGauge(r, "mmfree_session_store_lost_sessions",
                       "Sessions lost with a damaged file of a store of this server's own and not "
                       "deleted yet: their calls end with DATA_LOSS. Unit: sessions.")
                  .Add({})),
        expired_(AddCounter(r, "mmfree_sessions_expired_total",
                            "Sessions removed because their time to live passed. Unit: sessions.")
                     .Add({})),
        turns_(AddCounter(r, "mmfree_session_turns_total",
                          "Turns of sessions that ended, by outcome: committed, not_committed, "
                          "conflict, store_unavailable. Unit: turns.")),
        cache_bytes_(AddGauge(r, "mmfree_session_host_cache_bytes",
                              "States of sessions held in memory in front of the store, in bytes.")
                         .Add({})),
        cache_states_(AddGauge(r, "mmfree_session_host_cache_states",
                               "States of sessions held in memory in front of the store. Unit: "
                               "states.")
                          .Add({})),
        device_bytes_(AddGauge(r, "mmfree_session_device_bytes",
                               "States of idle sessions in the memory of devices, in bytes.")
                          .Add({})),
        device_states_(AddGauge(r, "mmfree_session_device_states",
                                "States of idle sessions in the memory of devices. Unit: states.")
                           .Add({})),
        resumes_(AddCounter(r, "mmfree_session_resumes_total",
                            "Turns that went on from a state, by where it was: device, host, "
                            "store. Unit: turns.")),
        resumed_{&resumes_.Add({{"tier", "device"}}), &resumes_.Add({{"tier", "host"}}),
                 &resumes_.Add({{"tier", "store"}})},
        evictions_(AddCounter(r, "mmfree_session_evictions_total",
                              "States that made room for others, by the tier that they left: "
                              "device, host. Unit: states.")),
        evicted_{&evictions_.Add({{"tier", "device"}}), &evictions_.Add({{"tier", "host"}})},
        cache_(AddCounter(r, "mmfree_session_host_cache_total",
                          "States that were needed, by result: hit, or miss and read from the "
                          "store. Unit: states.")),
        hits_(cache_.Add({{"result", "hit"}})),
        misses_(cache_.Add({{"result", "miss"}})),
        store_time_(prometheus::BuildHistogram()
                        .Name("mmfree_session_store_duration_seconds")
                        .Help("One call of the session store, in seconds, by operation and "
                              "outcome: ok, refused (an answer about a session), unavailable, "
                              "data_loss.")
                        .Register(r)),
        store_errors_(AddCounter(r, "mmfree_session_store_errors_total",
                                 "Calls of the session store that failed, by operation and kind: "
                                 "unavailable, data_loss. Unit: calls.")),
        reachable_(
            AddGauge(r, "mmfree_session_store_reachable",
                     "1 while the session store can be read and written, as its calls and probes "
                     "tell, otherwise 0.")
                .Add({})) {
    const Histogram::BucketBoundaries buckets = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01,
                                                 0.02,   0.05,   0.1,    0.2,   0.5,   1.0,   5.0};
    for (const char* operation : kOperations) {
      for (const char* outcome : kOutcomes) {
        Histogram& time =
            store_time_.Add({{"operation", operation}, {"outcome", outcome}}, buckets);
        store_times_.emplace(Call(operation, outcome), &time);
      }
      for (const char* kind : kErrors) {
        Counter& errors = store_errors_.Add({{"operation", operation}, {"kind", kind}});
        store_error_counts_.emplace(Call(operation, kind), &errors);
      }
    }
    for (const char* outcome : {"committed", "not_committed", "conflict", "store_unavailable"}) {
      turns_.Add({{"outcome", outcome}});
    }
  }

  void SetBusy(int64_t sessions) override { busy_.Set(static_cast<double>(sessions)); }
  void SetStored(int64_t sessions) override { stored_.Set(static_cast<double>(sessions)); }
  void SetLost(int64_t sessions) override { lost_.Set(static_cast<double>(sessions)); }
  void CountExpired(int64_t sessions) override {
    expired_.Increment(static_cast<double>(sessions));
  }
  void CountTurn(absl::string_view outcome) override {
    turns_.Add({{"outcome", std::string(outcome)}}).Increment();
  }
  void SetHostCache(int64_t states, int64_t bytes) override {
    cache_states_.Set(static_cast<double>(states));
    cache_bytes_.Set(static_cast<double>(bytes));
  }
  void CountHostCache(bool hit) override { (hit ? hits_ : misses_).Increment(); }
  void AddDeviceStates(int64_t states, int64_t bytes) override {
    device_states_.Increment(static_cast<double>(states));
    device_bytes_.Increment(static_cast<double>(bytes));
  }
  void CountResume(Tier tier) override { resumed_[static_cast<size_t>(tier)]->Increment(); }
  void CountEvictions(Tier tier, int64_t states) override {
    evicted_[static_cast<size_t>(tier)]->Increment(static_cast<double>(states));
  }
  void ObserveStore(absl::string_view operation, absl::string_view outcome,
                    absl::Duration time) override {
    const Call call(operation, outcome);
    const auto times = store_times_.find(call);
    if (times != store_times_.end()) times->second->Observe(absl::ToDoubleSeconds(time));
    const auto errors = store_error_counts_.find(call);
    if (errors != store_error_counts_.end()) errors->second->Increment();
  }
  void SetStoreReachable(bool reachable) override { reachable_.Set(reachable ? 1 : 0); }

 private:
  using Call = std::pair<absl::string_view, absl::string_view>;  // operation, outcome or kind

  Gauge& busy_;
  Gauge& stored_;
  Gauge& lost_;
  Counter& expired_;
  Family<Counter>& turns_;
  Gauge& cache_bytes_;
  Gauge& cache_states_;
  Gauge& device_bytes_;
  Gauge& device_states_;
  Family<Counter>& resumes_;
  const std::array<Counter*, 3> resumed_;  // by Tier
  Family<Counter>& evictions_;
  const std::array<Counter*, 2> evicted_;  // by Tier
  Family<Counter>& cache_;
  Counter& hits_;
  Counter& misses_;
  Family<Histogram>& store_time_;
  Family<Counter>& store_errors_;
  Gauge& reachable_;
  // Of literals; complete after construction.
  std::map<Call, Histogram*> store_times_;
  std::map<Call, Counter*> store_error_counts_;
};

}  // namespace

std::unique_ptr<SessionMetrics> SessionMetrics::Create(prometheus::Registry* registry) {
  return std::make_unique<SessionMetricsImpl>(*registry);
}

}  // namespace mmfree
