// What RocksDB cannot read of an open database: read past it, and taken out.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_MEND_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_MEND_H_

#include <rocksdb/db.h>
#include <rocksdb/write_batch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/sessions/rocksdb_blob.h"
#include "server/sessions/rocksdb_gather.h"
#include "server/sessions/session.h"

namespace mmfree {

// The bytes of the tables that there were when this was made. Not thread-safe.
class RocksDbRawReader {
 public:
  // Of the tables that may have `key`, or of all.
  RocksDbRawReader(rocksdb::DB* db, const std::string& directory,
                   const std::optional<std::string>& key);

  // A record's value. nullopt: it is not there. DATA_LOSS: it is lost, or may be: a later one may
  // have been in what is.
  absl::StatusOr<std::optional<std::string>> ReadRecord(const std::string& key) const;
  // What is there of a checkpoint, right or not; nullopt: nothing.
  std::optional<std::string> ReadCheckpoint(const std::string& key) const {
    return gather_.ReadCheckpoint(key);
  }

 private:
  RocksDbBlobReader blobs_;
  RocksDbGather gather_;
};

struct MendedStates {
  int64_t mended = 0;         // that RocksDB could not read
  bool present_lost = false;  // the session cannot go on from where it is
};
// Adds to `batch` what makes the states of a session readable, or has those that are damaged taken
// out, so that no compaction meets them. While the session does not change. `read` reads a
// checkpoint past RocksDB. UNAVAILABLE: the database cannot be read.
absl::StatusOr<MendedStates> MendRocksDbStates(
    rocksdb::DB* db, const SessionName& name,
    const std::function<std::optional<std::string>(const std::string& key)>& read,
    rocksdb::WriteBatch* batch);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_MEND_H_
