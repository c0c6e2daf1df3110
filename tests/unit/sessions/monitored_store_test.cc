#include "server/sessions/monitored_store.h"

#include <prometheus/registry.h>

#include <atomic>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/memory_store.h"
#include "tests/support/metric_reader.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::_;

// What the test and its store share. Thread-safe.
struct Switches {
  std::atomic<bool> readable{true};
  std::atomic<bool> writable{true};
  std::atomic<int> probes{0};
};

// A store on a disk that can be full, or away.
class SwitchedStore final : public SessionStore {
 public:
  explicit SwitchedStore(Switches* switches)
      : switches_(switches), store_(MakeMemoryStore({.max_bytes = 1 << 20})) {}

  absl::string_view name() const override { return "switched"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return store_->count(); }
  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    if (!switches_->readable) return absl::UnavailableError("away");
    return store_->Read(name);
  }
  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    return store_->ReadCheckpoint(name, revision);
  }
  absl::Status Commit(const StoreChange& change) override {
    if (!switches_->writable) return absl::UnavailableError("full");
    return store_->Commit(change);
  }
  absl::Status Delete(const SessionName& name) override { return store_->Delete(name); }
  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    return store_->List(owner, visit);
  }
  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    return store_->RemoveExpired(limit);
  }
  absl::Status Probe(int64_t) override {
    ++switches_->probes;
    return switches_->readable && switches_->writable ? absl::OkStatus()
                                                      : absl::UnavailableError("away or full");
  }

 private:
  Switches* const switches_;
  const std::unique_ptr<SessionStore> store_;
};

class MonitoredStoreTest : public testing::Test {
 protected:
  MonitoredStoreTest() {
    change_.name = {"alice", "s"};
    change_.revision = 1;
    change_.record = "record";
  }

  std::unique_ptr<MonitoredStore> Make(absl::Duration interval) {
    return std::make_unique<MonitoredStore>(
        std::make_unique<SwitchedStore>(&switches_),
        StoreHealth::Options{.interval = interval,
                             .first_retry = absl::Milliseconds(1),
                             .max_retry = absl::Milliseconds(1)},
        metrics_.get());
  }
  double Reachable() { return MetricValue(registry_, "mmfree_session_store_reachable"); }
  // Whether the store has become so, by probes alone.
  static bool Becomes(const MonitoredStore& store, bool usable) {
    const absl::Time give_up = absl::Now() + Patience(absl::Minutes(1));
    while (store.usable() != usable && absl::Now() < give_up) absl::SleepFor(absl::Milliseconds(1));
    return store.usable() == usable;
  }

  StoreChange change_;
  Switches switches_;
  prometheus::Registry registry_;
  std::unique_ptr<SessionMetrics> metrics_ = SessionMetrics::Create(&registry_);
};

TEST_F(MonitoredStoreTest, CallsTellWithoutProbes) {
  const auto store = Make(absl::InfiniteDuration());
  EXPECT_EQ(Reachable(), 1);
  switches_.writable = false;
  EXPECT_THAT(store->Commit(change_), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_THAT(store->Read(change_.name), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_FALSE(store->usable());
  EXPECT_EQ(Reachable(), 0);
  switches_.writable = true;
  EXPECT_THAT(store->Commit(change_), IsOk());
  EXPECT_TRUE(store->usable());
  EXPECT_EQ(Reachable(), 1);
  EXPECT_EQ(switches_.probes, 0);
}

TEST_F(MonitoredStoreTest, AnIdleStoreIsProbed) {
  const auto store = Make(absl::Milliseconds(1));
  EXPECT_TRUE(Becomes(*store, true));
  switches_.readable = false;
  EXPECT_TRUE(Becomes(*store, false));
  EXPECT_EQ(Reachable(), 0);
  switches_.readable = true;
  EXPECT_TRUE(Becomes(*store, true));
  EXPECT_EQ(Reachable(), 1);
}

TEST_F(MonitoredStoreTest, AFailureBringsTheNextProbeForward) {
  switches_.writable = false;
  const auto away = Make(absl::Hours(1));
  EXPECT_FALSE(away->usable()) << "the first probe was not awaited";
  switches_.writable = true;
  EXPECT_TRUE(Becomes(*away, true));
  switches_.writable = false;
  EXPECT_THAT(away->Commit(change_), StatusIs(absl::StatusCode::kUnavailable, _));
  switches_.writable = true;
  EXPECT_TRUE(Becomes(*away, true));
}

TEST_F(MonitoredStoreTest, EveryCallIsTimedByOperationAndOutcome) {
  const auto store = Make(absl::Hours(1));
  const std::string family = "mmfree_session_store_duration_seconds";
  EXPECT_THAT(store->Commit(change_), IsOk());
  EXPECT_THAT(store->Commit(change_), StatusIs(absl::StatusCode::kAlreadyExists, _));
  EXPECT_THAT(store->Read(change_.name), IsOk());
  EXPECT_THAT(store->ReadCheckpoint(change_.name, 5), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store->List("alice", [](const StoredRecord&) {}), IsOk());
  EXPECT_THAT(store->RemoveExpired(1), IsOk());
  EXPECT_THAT(store->Delete(change_.name), IsOk());
  switches_.readable = false;
  EXPECT_THAT(store->Read(change_.name), StatusIs(absl::StatusCode::kUnavailable, _));
  for (const char* once : {"read_checkpoint", "list", "remove_expired", "delete"}) {
    EXPECT_EQ(MetricValue(registry_, family, "operation", once), 1) << once;
  }
  EXPECT_EQ(MetricValue(registry_, family, "operation", "commit"), 2);
  EXPECT_EQ(MetricValue(registry_, family, "operation", "read"), 2);
  EXPECT_GE(MetricValue(registry_, family, "operation", "probe"), 1);
  EXPECT_EQ(MetricValue(registry_, family, "outcome", "refused"), 2);
  EXPECT_GE(MetricValue(registry_, family, "outcome", "unavailable"), 1);
  EXPECT_GE(MetricValue(registry_, "mmfree_session_store_errors_total", "operation", "read"), 1);
}

}  // namespace
}  // namespace mmfree
