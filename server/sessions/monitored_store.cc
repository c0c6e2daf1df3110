#include "server/sessions/monitored_store.h"

#include <pthread.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/log.h"

namespace mmfree {
namespace {

using Call = StoreHealth::Call;

const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

// As the metrics name it. What is said of a session (there is none, it has moved on) is no fault of
// the store.
absl::string_view OutcomeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return "ok";
    case absl::StatusCode::kUnavailable:
      return "unavailable";
    case absl::StatusCode::kDataLoss:
      return "data_loss";
    default:
      return "refused";
  }
}

int64_t BytesOf(const StoreChange& change) {
  const size_t checkpoint = change.checkpoint == nullptr ? 0 : change.checkpoint->size();
  return static_cast<int64_t>(change.record.size() + checkpoint);
}

}  // namespace

MonitoredStore::MonitoredStore(std::unique_ptr<SessionStore> store,
                               const StoreHealth::Options& health, SessionMetrics* metrics)
    : store_(std::move(store)), metrics_(metrics), health_(health, absl::Now()) {
  metrics_->SetStoreReachable(true);
  if (store_->in_memory() || health.interval == absl::InfiniteDuration()) return;
  Probe(StoreHealth::kProbeBytes).IgnoreError();
  prober_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "mmfree-probe");
    RunProbes();
  });
}

MonitoredStore::~MonitoredStore() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    wake_ = true;
  }
  if (prober_.joinable()) prober_.join();
}

bool MonitoredStore::usable() const {
  absl::MutexLock lock(&mutex_);
  return health_.usable();
}

absl::StatusOr<StoredRecord> MonitoredStore::Read(const SessionName& name) {
  return Measure("read", Call::kRead, 0, [&] { return store_->Read(name); });
}
absl::StatusOr<SharedBytes> MonitoredStore::ReadCheckpoint(const SessionName& name,
                                                           uint64_t revision) {
  return Measure("read_checkpoint", Call::kRead, 0,
                 [&] { return store_->ReadCheckpoint(name, revision); });
}
absl::Status MonitoredStore::Commit(const StoreChange& change) {
  return Measure("commit", Call::kWrite, BytesOf(change), [&] { return store_->Commit(change); });
}
absl::Status MonitoredStore::Delete(const SessionName& name) {
  return Measure("delete", Call::kRemove, 0, [&] { return store_->Delete(name); });
}
absl::Status MonitoredStore::List(const std::string& owner,
                                  const std::function<void(const StoredRecord&)>& visit) {
  return Measure("list", Call::kRead, 0, [&] { return store_->List(owner, visit); });
}
absl::StatusOr<int64_t> MonitoredStore::RemoveExpired(int64_t limit) {
  return Measure("remove_expired", Call::kRemove, 0, [&] { return store_->RemoveExpired(limit); });
}

absl::Status MonitoredStore::Probe(int64_t bytes) {
  absl::Status status = Time("probe", [&] { return store_->Probe(bytes); });
  absl::MutexLock lock(&mutex_);
  const bool was_usable = health_.usable();
  health_.NoteProbe(status, absl::Now());
  Report(was_usable, status);
  return status;
}

template <typename Function>
std::invoke_result_t<Function> MonitoredStore::Measure(absl::string_view operation, Call call,
                                                       int64_t bytes, const Function& function) {
  std::invoke_result_t<Function> result = Time(operation, function);
  absl::MutexLock lock(&mutex_);
  const bool was_usable = health_.usable();
  health_.Note(call, StatusOf(result), bytes, absl::Now());
  Report(was_usable, StatusOf(result));
  return result;
}

template <typename Function>
std::invoke_result_t<Function> MonitoredStore::Time(absl::string_view operation,
                                                    const Function& function) {
  const absl::Time start = absl::Now();
  std::invoke_result_t<Function> result = function();
  const absl::string_view outcome = OutcomeOf(StatusOf(result));
  metrics_->ObserveStore(operation, outcome, absl::Now() - start);
  return result;
}

void MonitoredStore::Report(bool was_usable, const absl::Status& status) {
  if (health_.usable() == was_usable) return;
  metrics_->SetStoreReachable(!was_usable);
  if (was_usable) {
    Log(LogLevel::kError, absl::StrCat("the session store cannot be used: ", status.message()));
    wake_ = true;
  } else {
    Log(LogLevel::kInfo, "the session store can be used again");
  }
}

void MonitoredStore::RunProbes() {
  for (;;) {
    int64_t bytes = 0;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithDeadline(absl::Condition(&wake_), health_.next_probe());
      wake_ = false;
      if (stopping_) return;
      if (health_.next_probe() > absl::Now()) continue;
      bytes = health_.probe_bytes();
    }
    Probe(bytes).IgnoreError();
  }
}

}  // namespace mmfree
