// The sessions of a server: turns as transactions, forks, rewinds, expiry, over a store.
#ifndef MMFREE_SERVER_SESSIONS_SESSION_TABLE_H_
#define MMFREE_SERVER_SESSIONS_SESSION_TABLE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/metrics/session_metrics.h"
#include "server/sessions/buffer_pool.h"
#include "server/sessions/device_pool.h"
#include "server/sessions/host_cache.h"
#include "server/sessions/monitored_store.h"
#include "server/sessions/session.h"
#include "server/sessions/session_key.h"
#include "server/sessions/session_record.h"
#include "server/sessions/store.h"
#include "server/sessions/store_health.h"

namespace mmfree {

class SessionTurn;

// Thread-safe. Calls block on the store: not from a gRPC thread, the step thread or a delivery
// thread. Errors of the store come through as they are (store.h); NOT_FOUND also for what belongs
// to another owner.
class SessionTable {
 public:
  struct Options {
    absl::Duration ttl = absl::InfiniteDuration();  // of sessions that do not say
    int32_t kept_turns = 4;                         // before the present one, for fork and rewind
    int64_t kept_bytes = 8 << 20;          // of one session's states, the present one always kept
    int64_t host_cache_bytes = 256 << 20;  // of checkpoints in front of a store that is not memory
    SessionKey key = {};                   // signs what is stored
    absl::Duration sweep_interval = absl::Seconds(30);  // between looks for expired sessions
    StoreHealth::Options store_health = {};             // an infinite interval: no probes
    const Clock* clock = Clock::Real();
  };

  // Blocks on the store, for a probe. `metrics` outlives the table.
  SessionTable(Options options, std::unique_ptr<SessionStore> store, SessionMetrics* metrics);
  ~SessionTable();
  SessionTable(const SessionTable&) = delete;
  SessionTable& operator=(const SessionTable&) = delete;

  const SessionKey& key() const { return options_.key; }

  // Keeps the present states of sessions on this device, too, when they come with a place there
  // (SessionState::device). Before the first session.
  void AddDevice(std::shared_ptr<DevicePool> pool) { devices_.push_back(std::move(pool)); }

  // Makes a session with `state` as its present, turn state.turn. An empty id: a random one.
  // `ttl` absent: Options::ttl. ALREADY_EXISTS, RESOURCE_EXHAUSTED.
  absl::StatusOr<SessionInfo> Create(SessionName name, const std::string& model,
                                     const std::string& model_digest, const SessionState& state,
                                     std::optional<absl::Duration> ttl);

  absl::StatusOr<SessionInfo> Get(const SessionName& name);

  struct Page {
    std::vector<SessionInfo> sessions;  // most recently used first
    std::string next_page_token;        // empty: the last page
  };
  // Sessions of `owner`, of `model` when that is not empty. Reads the records of all the owner's
  // sessions. INVALID_ARGUMENT: `page_token` is not one that this gave.
  absl::StatusOr<Page> List(const std::string& owner, const std::string& model, int32_t page_size,
                            const std::string& page_token);

  // Makes `new_name` with the context of `source` at the end of `turn` (absent: the present).
  absl::StatusOr<SessionInfo> Fork(const SessionName& source, std::optional<uint64_t> turn,
                                   SessionName new_name, std::optional<absl::Duration> ttl);

  // Makes the end of `turn` the present. ABORTED: a turn is running.
  absl::StatusOr<SessionInfo> Rewind(const SessionName& name, uint64_t turn);

  struct ReadResult {
    SessionInfo session;
    SessionState state;
  };
  // The state at the end of `turn` (absent: the present).
  absl::StatusOr<ReadResult> Read(const SessionName& name, std::optional<uint64_t> turn,
                                  const ModelShape& shape);

  // A running turn is told (SessionTurn::OnDelete) and cannot commit.
  absl::Status Delete(const SessionName& name);

  // Takes the session for a turn. ABORTED: a turn is running here, or `expected_turn` is not the
  // present one.
  absl::StatusOr<std::unique_ptr<SessionTurn>> Begin(const SessionName& name,
                                                     std::optional<uint64_t> expected_turn);

  // Removes expired sessions; what the table's own thread does every sweep_interval.
  void Sweep();

  // Turns that run on this server.
  int64_t busy() const;

  // Whether the store can be read and written, as far as is known. Does not block on it.
  bool store_usable() const { return store_->usable(); }
  // Whether it knows of no session that was lost with a damaged file.
  bool store_whole() const { return store_->lost() == 0; }

 private:
  friend class SessionTurn;

  // A session with a running turn or rewind.
  struct Hold {
    bool deleted = false;
    std::function<void()> on_delete;
  };

  // A record as it is in the store, with what a change of it must expect.
  struct Loaded {
    uint64_t revision = 0;
    SessionRecord record;
  };

  absl::StatusOr<std::shared_ptr<Hold>> Acquire(const SessionName& name);
  void Release(const SessionName& name);
  absl::StatusOr<Loaded> Load(const SessionName& name);
  SharedBytes Serialize(const SessionState& state, const std::string& model_digest);
  // `tier`: where it was.
  absl::StatusOr<SharedBytes> LoadCheckpoint(const SessionName& name, const KeptTurn& turn,
                                             SessionTier* tier = nullptr);
  // The context that is committed under `revision` when a device has its state; otherwise null.
  std::shared_ptr<const SessionState> FindOnDevice(uint64_t revision);
  // Keeps what is committed under `revision` on its device, when it has a place there.
  void KeepOnDevice(uint64_t revision, SessionState context);
  // Forgets what is kept of a checkpoint but in the store.
  void Forget(uint64_t revision);
  void UpdateHostCache(int64_t evicted);
  absl::Status Commit(const SessionRecord& record, std::optional<uint64_t> expected,
                      uint64_t revision, SharedBytes checkpoint, std::vector<uint64_t> obsolete);
  absl::StatusOr<SessionInfo> CreateWith(SessionRecord record, SharedBytes checkpoint,
                                         const SessionState& context);
  SessionInfo InfoOf(const SessionRecord& record) const;
  // Tells the metrics how many sessions the store has.
  void UpdateStored();
  void RunSweeps();

  const Options options_;
  const std::unique_ptr<MonitoredStore> store_;
  SessionMetrics* const metrics_;
  BufferPool buffers_;
  HostCache cache_;
  std::vector<std::shared_ptr<DevicePool>> devices_;  // constant once there are sessions

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<SessionName, std::shared_ptr<Hold>> holds_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread sweeper_;
};

// One running turn. Its destruction without a commit leaves the session as it was. Not thread-safe,
// but may move between threads.
class SessionTurn {
 public:
  ~SessionTurn();
  SessionTurn(const SessionTurn&) = delete;
  SessionTurn& operator=(const SessionTurn&) = delete;

  // As the turn found it.
  SessionInfo session() const { return table_->InfoOf(loaded_.record); }

  // The state the turn starts from; only on the device when one has it. DATA_LOSS: what is stored
  // is damaged.
  absl::StatusOr<SessionState> Load(const ModelShape& shape);

  // Calls `callback`, once, when the session is deleted during the turn; at once when it was. From
  // any thread, possibly after the turn is gone.
  void OnDelete(std::function<void()> callback);
  bool deleted() const;

  // Makes `state`, which is on the host and may be on a device, too, the session's present, with
  // turn one more than before: durable when this returns OK. ABORTED: the session was deleted or
  // changed meanwhile. Once.
  absl::StatusOr<SessionInfo> Commit(SessionState state);

 private:
  friend class SessionTable;
  SessionTurn(SessionTable* table, SessionTable::Loaded loaded,
              std::shared_ptr<SessionTable::Hold> hold)
      : table_(table), loaded_(std::move(loaded)), hold_(std::move(hold)) {}

  SessionTable* const table_;
  const SessionTable::Loaded loaded_;
  const std::shared_ptr<SessionTable::Hold> hold_;  // its content is guarded by the table's mutex
  const char* outcome_ = "not_committed";           // of the metrics
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_SESSION_TABLE_H_
