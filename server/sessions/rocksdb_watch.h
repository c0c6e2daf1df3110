// What RocksDB's threads meet of damage.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_WATCH_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_WATCH_H_

#include <rocksdb/listener.h>
#include <rocksdb/status.h>

#include <atomic>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace mmfree {

// Whether what it says will be the same next time: a checksum is wrong, or a file is gone.
inline bool IsRocksDbDamage(const rocksdb::Status& status) {
  return status.IsCorruption() || status.IsPathNotFound();
}

// A compaction that meets damage would make RocksDB refuse all writes, for the sake of what is lost
// anyway. Told here that it is no matter, RocksDB goes on, and tries again after a second.
// Thread-safe.
class RocksDbWatch final : public rocksdb::EventListener {
 public:
  void OnCompactionBegin(rocksdb::DB* db, const rocksdb::CompactionJobInfo& info) override;
  void OnBackgroundError(rocksdb::BackgroundErrorReason reason, rocksdb::Status* error) override;

  // States are known to be gone.
  void NoteLostStates();
  // Nobody is to wait, or to mend, any more.
  void Stop();
  bool stopped() const;

  struct Damage {
    bool stopped = false;
    bool states = false;
    bool compaction = false;
  };
  // Waits for something of that, for up to `timeout`, and takes it.
  Damage Await(absl::Duration timeout);
  // What compactions that have begun before may still meet is mended.
  void NoteMended();

 private:
  std::atomic<uint64_t> mends_{0};
  mutable absl::Mutex mutex_;
  Damage damage_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_WATCH_H_
