#include "server/sessions/metered_store.h"

#include <type_traits>
#include <utility>

#include "absl/time/clock.h"

namespace mmfree {
namespace {

const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

class MeteredStore final : public SessionStore {
 public:
  MeteredStore(std::unique_ptr<SessionStore> store, SessionMetrics* metrics)
      : store_(std::move(store)), metrics_(metrics) {
    metrics_->SetStoreReachable(true);
  }

  absl::string_view name() const override { return store_->name(); }
  bool in_memory() const override { return store_->in_memory(); }
  std::optional<int64_t> count() const override { return store_->count(); }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    return Measure("read", [&] { return store_->Read(name); });
  }
  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    return Measure("read_checkpoint", [&] { return store_->ReadCheckpoint(name, revision); });
  }
  absl::Status Commit(const StoreChange& change) override {
    return Measure("commit", [&] { return store_->Commit(change); });
  }
  absl::Status Delete(const SessionName& name) override {
    return Measure("delete", [&] { return store_->Delete(name); });
  }
  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    return Measure("list", [&] { return store_->List(owner, visit); });
  }
  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    return Measure("remove_expired", [&] { return store_->RemoveExpired(limit); });
  }

 private:
  template <typename Call>
  std::invoke_result_t<Call> Measure(absl::string_view operation, const Call& call) {
    const absl::Time start = absl::Now();
    std::invoke_result_t<Call> result = call();
    const absl::StatusCode code = StatusOf(result).code();
    metrics_->ObserveStore(operation, absl::Now() - start);
    // The other codes are answers about a session, not faults of the store.
    const bool unreachable = code == absl::StatusCode::kUnavailable;
    if (unreachable) metrics_->CountStoreError(operation, "unavailable");
    if (code == absl::StatusCode::kDataLoss) metrics_->CountStoreError(operation, "data_loss");
    metrics_->SetStoreReachable(!unreachable);
    return result;
  }

  const std::unique_ptr<SessionStore> store_;
  SessionMetrics* const metrics_;
};

}  // namespace

std::unique_ptr<SessionStore> MakeMeteredStore(std::unique_ptr<SessionStore> store,
                                               SessionMetrics* metrics) {
  return std::make_unique<MeteredStore>(std::move(store), metrics);
}

}  // namespace mmfree
