// A store whose calls are counted and timed, and that is probed while it is not used.
#ifndef MMFREE_SERVER_SESSIONS_MONITORED_STORE_H_
#define MMFREE_SERVER_SESSIONS_MONITORED_STORE_H_

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/base/clock.h"
#include "server/metrics/session_metrics.h"
#include "server/sessions/store.h"
#include "server/sessions/store_health.h"

namespace mmfree {

// Thread-safe, with a thread of its own for the probes.
class MonitoredStore final : public SessionStore {
 public:
  // Probes once before it returns, and then as `health` says, in real time; never when its interval
  // is infinite or the store is in memory. `metrics` outlives the store.
  MonitoredStore(std::unique_ptr<SessionStore> store, const StoreHealth::Options& health,
                 SessionMetrics* metrics);
  // Waits for a probe that is under way.
  ~MonitoredStore() override;

  // Whether the store can be read and written, as far as is known. Does not block on it.
  bool usable() const;

  absl::string_view name() const override { return store_->name(); }
  bool in_memory() const override { return store_->in_memory(); }
  std::optional<int64_t> count() const override { return store_->count(); }
  int64_t lost() const override { return store_->lost(); }
  absl::StatusOr<StoredRecord> Read(const SessionName& name) override;
  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override;
  absl::Status Commit(const StoreChange& change) override;
  absl::Status Delete(const SessionName& name) override;
  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override;
  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override;
  absl::Status Probe(int64_t bytes) override;

 private:
  // Calls `function`, which is to write `bytes`, and reports how that ended.
  template <typename Function>
  std::invoke_result_t<Function> Measure(absl::string_view operation, StoreHealth::Call call,
                                         int64_t bytes, const Function& function);
  // The same without a word to health_.
  template <typename Function>
  std::invoke_result_t<Function> Time(absl::string_view operation, const Function& function);
  // Tells when the store has become usable, or has ceased to be.
  void Report(bool was_usable, const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RunProbes();

  const std::unique_ptr<SessionStore> store_;
  SessionMetrics* const metrics_;

  mutable absl::Mutex mutex_;
  StoreHealth health_ ABSL_GUARDED_BY(mutex_);
  bool wake_ ABSL_GUARDED_BY(mutex_) = false;  // the next probe may be due earlier than it was
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread prober_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_MONITORED_STORE_H_
