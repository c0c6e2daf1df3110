// Checkpoints in host memory, in front of a store: the tier between state slots and the store.
#ifndef MMFREE_SERVER_SESSIONS_HOST_CACHE_H_
#define MMFREE_SERVER_SESSIONS_HOST_CACHE_H_

#include <cstdint>
#include <list>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "server/sessions/store.h"

namespace mmfree {

// Least recently used go first. Keyed by revision, which names one content for ever, so it needs no
// invalidation whoever else writes to the store. Thread-safe.
class HostCache {
 public:
  // 0: keeps nothing.
  explicit HostCache(int64_t max_bytes) : max_bytes_(max_bytes) {}
  HostCache(const HostCache&) = delete;
  HostCache& operator=(const HostCache&) = delete;

  // Null when it is not here.
  SharedBytes Get(uint64_t revision);
  bool Contains(uint64_t revision) const;
  // How many had to leave for it, itself among them when it alone is above the budget.
  int64_t Put(uint64_t revision, SharedBytes bytes);
  void Erase(uint64_t revision);

  int64_t bytes() const;
  int64_t states() const;

 private:
  struct Entry {
    uint64_t revision;
    SharedBytes bytes;
  };

  // What an entry costs with its links.
  static int64_t Cost(const Entry& entry) {
    constexpr int64_t kOverhead = 128;
    return static_cast<int64_t>(entry.bytes->size()) + kOverhead;
  }
  void EraseLocked(uint64_t revision) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int64_t max_bytes_;
  mutable absl::Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // most recently used first
  absl::flat_hash_map<uint64_t, std::list<Entry>::iterator> by_revision_ ABSL_GUARDED_BY(mutex_);
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_HOST_CACHE_H_
