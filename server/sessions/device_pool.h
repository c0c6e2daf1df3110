// States of idle sessions in the memory of one device: the tier in front of all others.
#ifndef MMFREE_SERVER_SESSIONS_DEVICE_POOL_H_
#define MMFREE_SERVER_SESSIONS_DEVICE_POOL_H_

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/metrics/session_metrics.h"
#include "server/sessions/session.h"

namespace mmfree {

class DevicePool;

// Room for one state in a device's memory, which goes back to its pool with the last pointer to it.
// Written once by who took it, read only afterwards. Thread-safe; must not be read once the pool's
// engine is gone.
class DevicePlace {
 public:
  using FreeSlots = std::function<void(int32_t slot)>;

  DevicePlace(const DevicePool* pool, int32_t slot, FreeSlots release)
      : pool_(pool), slot_(slot), release_(std::move(release)) {}
  ~DevicePlace() { release_(slot_); }
  DevicePlace(const DevicePlace&) = delete;
  DevicePlace& operator=(const DevicePlace&) = delete;

  // For telling pools apart; valid as a pointer only while the pool's engine is there.
  const DevicePool* pool() const { return pool_; }
  // The resident slot of the engine's backend.
  int32_t slot() const { return slot_; }

  // The state that was copied here: resizes `state`. Blocks until it is on the host. Errors of the
  // device.
  absl::Status Read(std::vector<float>* state) const;

 private:
  const DevicePool* const pool_;
  const int32_t slot_;
  const FreeSlots release_;
};

// Holds contexts whose state is on the device (SessionState::device), least recently used ones
// leaving for new ones. Every one of them is committed to the store, so leaving is forgetting.
// Keyed by revision, which names one content for ever, so whatever changes a session anywhere needs
// no invalidation. Thread-safe.
class DevicePool {
 public:
  struct Options {
    int32_t first_slot = 0;  // the backend's resident slots: first_slot, first_slot + 1, ...
    int32_t num_slots = 0;
    int64_t state_floats = 0;
    // Copies a resident slot to the host; from any thread, several at once.
    std::function<absl::Status(int32_t slot, absl::Span<float> state)> read;
  };

  // `metrics` may be null; otherwise it outlives the pool.
  DevicePool(Options options, SessionMetrics* metrics);
  ~DevicePool() { Close(); }
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  // A place for a state; the least recently used contexts make room. Null: what runs has all of
  // them, or the pool is closed.
  std::shared_ptr<const DevicePlace> Take();

  // Keeps a context that is committed under `revision`, with its place, which is of this pool. Its
  // `state` is let go.
  void Put(uint64_t revision, SessionState context);
  // Null when it is not here. The context keeps its place while the caller has it, also when it
  // leaves.
  std::shared_ptr<const SessionState> Get(uint64_t revision);
  bool Contains(uint64_t revision) const;
  void Erase(uint64_t revision);

  // The device has failed: forgets everything and takes nothing from now on.
  void Close();

  int64_t state_bytes() const {
    return options_.state_floats * static_cast<int64_t>(sizeof(float));
  }

 private:
  friend class DevicePlace;

  struct Entry {
    uint64_t revision;
    std::shared_ptr<const SessionState> context;
  };
  using Entries = std::list<Entry>;

  // Slots without a place; shared with the places, which may outlive the pool.
  struct FreeList {
    absl::Mutex mutex;
    std::vector<int32_t> slots ABSL_GUARDED_BY(mutex);
  };

  // Takes an entry out; the caller lets it go without the lock.
  Entries Extract(Entries::iterator entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool EvictOne();

  const Options options_;
  SessionMetrics* const metrics_;
  const std::shared_ptr<FreeList> free_ = std::make_shared<FreeList>();

  mutable absl::Mutex mutex_;
  Entries entries_ ABSL_GUARDED_BY(mutex_);  // most recently used first
  absl::flat_hash_map<uint64_t, Entries::iterator> by_revision_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_DEVICE_POOL_H_
