// How far the writes of a RocksDB database were acknowledged, beside its log: a log that was cut
// off or removed looks like one that a crash has cut off, but for this.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_MARK_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_MARK_H_

#include <cstdint>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace mmfree {

// In the database's directory: a sequence number (8 bytes) and its checksum (8). It is raised after
// the write is on the disk, so it is never ahead of the log; without fsync, so a power failure may
// set it back by what was raised since the last Sync. Thread-safe.
class RocksDbMark {
 public:
  explicit RocksDbMark(const std::string& directory);
  ~RocksDbMark();
  RocksDbMark(const RocksDbMark&) = delete;
  RocksDbMark& operator=(const RocksDbMark&) = delete;

  // Writes up to `sequence` are on the disk. A mark that cannot be written stays where it is.
  void Raise(uint64_t sequence);
  void Sync();
  // Its file was removed: the database is another one now.
  void Reset();

 private:
  const std::string path_;
  absl::Mutex mutex_;
  int file_ ABSL_GUARDED_BY(mutex_) = -1;
  uint64_t sequence_ ABSL_GUARDED_BY(mutex_) = 0;
  bool synced_ ABSL_GUARDED_BY(mutex_) = true;
};

// 0: there is none that can be read.
uint64_t ReadRocksDbMark(const std::string& directory);
// FAILED_PRECONDITION.
absl::Status RemoveRocksDbMark(const std::string& directory);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_MARK_H_
