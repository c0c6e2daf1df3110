#include "server/metrics/session_metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <string>

namespace mmfree {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

constexpr const char* kOperations[] = {"read", "read_checkpoint", "commit", "delete",
                                       "list", "remove_expired"};

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
        expired_(AddCounter(r, "mmfree_sessions_expired_total",
                            "Sessions removed because their time to live passed. Unit: sessions.")
                     .Add({})),
        turns_(AddCounter(r, "mmfree_session_turns_total",
                          "Turns of sessions that ended, by outcome: committed, not_committed, "
                          "conflict, store_unavailable. Unit: turns.")),
        cache_bytes_(AddGauge(r, "mmfree_session_host_cache_bytes",
                              "States of sessions held in memory in front of the store, in bytes.")
                         .Add({})),
        cache_(AddCounter(r, "mmfree_session_host_cache_total",
                          "States that were needed, by result: hit, or miss and read from the "
                          "store. Unit: states.")),
        hits_(cache_.Add({{"result", "hit"}})),
        misses_(cache_.Add({{"result", "miss"}})),
        store_time_(prometheus::BuildHistogram()
                        .Name("mmfree_session_store_duration_seconds")
                        .Help("One call of the session store by operation, in seconds.")
                        .Register(r)),
        store_errors_(AddCounter(r, "mmfree_session_store_errors_total",
                                 "Calls of the session store that failed, by operation and kind: "
                                 "unavailable, data_loss. Unit: calls.")),
        reachable_(AddGauge(r, "mmfree_session_store_reachable",
                            "1 when the last call reached the session store, otherwise 0.")
                       .Add({})) {
    const Histogram::BucketBoundaries buckets = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01,
                                                 0.02,   0.05,   0.1,    0.2,   0.5,   1.0,   5.0};
    for (const char* operation : kOperations) {
      store_times_.emplace(operation, &store_time_.Add({{"operation", operation}}, buckets));
      for (const char* kind : {"unavailable", "data_loss"}) CountError(operation, kind);
    }
    for (const char* outcome : {"committed", "not_committed", "conflict", "store_unavailable"}) {
      turns_.Add({{"outcome", outcome}});
    }
  }

  void SetBusy(int64_t sessions) override { busy_.Set(static_cast<double>(sessions)); }
  void SetStored(int64_t sessions) override { stored_.Set(static_cast<double>(sessions)); }
  void CountExpired(int64_t sessions) override {
    expired_.Increment(static_cast<double>(sessions));
  }
  void CountTurn(absl::string_view outcome) override {
    turns_.Add({{"outcome", std::string(outcome)}}).Increment();
  }
  void SetHostCacheBytes(int64_t bytes) override { cache_bytes_.Set(static_cast<double>(bytes)); }
  void CountHostCache(bool hit) override { (hit ? hits_ : misses_).Increment(); }
  void ObserveStore(absl::string_view operation, absl::Duration time) override {
    const auto found = store_times_.find(operation);
    if (found != store_times_.end()) found->second->Observe(absl::ToDoubleSeconds(time));
  }
  void CountStoreError(absl::string_view operation, absl::string_view kind) override {
    CountError(std::string(operation), std::string(kind)).Increment();
  }
  void SetStoreReachable(bool reachable) override { reachable_.Set(reachable ? 1 : 0); }

 private:
  Counter& CountError(const std::string& operation, const std::string& kind) {
    return store_errors_.Add({{"operation", operation}, {"kind", kind}});
  }

  Gauge& busy_;
  Gauge& stored_;
  Counter& expired_;
  Family<Counter>& turns_;
  Gauge& cache_bytes_;
  Family<Counter>& cache_;
  Counter& hits_;
  Counter& misses_;
  Family<Histogram>& store_time_;
  Family<Counter>& store_errors_;
  Gauge& reachable_;
  std::map<std::string, Histogram*, std::less<>> store_times_;  // by operation
};

}  // namespace

std::unique_ptr<SessionMetrics> SessionMetrics::Create(prometheus::Registry* registry) {
  return std::make_unique<SessionMetricsImpl>(*registry);
}

}  // namespace mmfree
