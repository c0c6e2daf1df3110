// Where committed sessions are kept: one interface, three stores (memory, RocksDB, Redis).
//
// A session in a store is a record (session_record.h), which is small and replaced by every change,
// and some checkpoints (checkpoint.h), each written once under the revision that made it. A
// revision is 64 random bits: comparing it tells whether anything happened to a session, so a
// change applies to exactly the session its author saw, whichever server wrote in between, and an
// author that lost its connection can tell afterwards whether its change was made.
#ifndef MMFREE_SERVER_SESSIONS_STORE_H_
#define MMFREE_SERVER_SESSIONS_STORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/sessions/session.h"

namespace mmfree {

using SharedBytes = std::shared_ptr<const std::string>;

// A revision; never 0.
uint64_t NewRevision();

struct StoredRecord {
  uint64_t revision = 0;
  absl::Time expire_time = absl::InfiniteFuture();
  std::string record;
};

// One atomic change of one session.
struct StoreChange {
  SessionName name;
  // The revision the session must have; unset: it must not exist.
  std::optional<uint64_t> expected;
  uint64_t revision = 0;  // that it gets
  absl::Time expire_time = absl::InfiniteFuture();
  absl::Time last_use_time;
  std::string record;
  SharedBytes checkpoint;          // stored under `revision`; null: none
  std::vector<uint64_t> obsolete;  // revisions whose checkpoints go
};

// Thread-safe; calls block, on disks and networks. Every call may fail with UNAVAILABLE: the store
// cannot be reached; a change then was not made, or its author cannot know. DATA_LOSS: the store
// says that what it holds is damaged.
class SessionStore {
 public:
  virtual ~SessionStore() = default;

  // "memory", "rocksdb" or "redis".
  virtual absl::string_view name() const = 0;
  // Whether it keeps what it holds in this process' memory.
  virtual bool in_memory() const = 0;

  // NOT_FOUND: there is none, or it has expired.
  virtual absl::StatusOr<StoredRecord> Read(const SessionName& name) = 0;
  // NOT_FOUND: the session or this checkpoint is gone.
  virtual absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name,
                                                     uint64_t revision) = 0;

  // Makes the change whole and durable, or not at all. ABORTED: the session's revision is another;
  // NOT_FOUND: it is gone; ALREADY_EXISTS: it was to be made and is there; RESOURCE_EXHAUSTED: no
  // room for another session.
  virtual absl::Status Commit(const StoreChange& change) = 0;

  // Removes a session and its checkpoints. NOT_FOUND.
  virtual absl::Status Delete(const SessionName& name) = 0;

  // Calls `visit` for each session of `owner` that has not expired, in no order, without locks
  // held.
  virtual absl::Status List(const std::string& owner,
                            const std::function<void(const StoredRecord&)>& visit) = 0;

  // Removes up to `limit` sessions that have expired, and says how many.
  virtual absl::StatusOr<int64_t> RemoveExpired(int64_t limit) = 0;

  // Writes a record of `bytes` that is no session's and reads it back: OK says that commits of that
  // size would work now.
  virtual absl::Status Probe(int64_t bytes) = 0;

  // Sessions in the store; nullopt when that would take a scan of what others share.
  virtual std::optional<int64_t> count() const = 0;
  // Of these, sessions that are known to be lost: calls say DATA_LOSS until they are deleted.
  virtual int64_t lost() const { return 0; }
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_STORE_H_
