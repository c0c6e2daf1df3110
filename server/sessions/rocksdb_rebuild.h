// The way past RocksDB tables, or a list of files, that are damaged.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_REBUILD_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_REBUILD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/sessions/session.h"

namespace mmfree {

struct RocksDbRebuild {
  std::string old_files;  // directory that has the files as they were, and `lost` as sessions.txt
  int64_t kept = 0;       // sessions
  std::vector<SessionName> lost;
};

// Writes the database in `directory`, which no process has open, anew from what can be read of its
// tables, blob files and logs. A session is as it was committed last, or its record says that it
// is lost: what is known of it, be it its name alone, may be older than what was in a damaged
// place. The old files are moved into a new directory within. FAILED_PRECONDITION: a file cannot be
// read or written, or the disk has no room for another copy.
absl::StatusOr<RocksDbRebuild> RebuildRocksDb(const std::string& directory);

// FAILED_PRECONDITION: the disk has no room for that.
absl::Status CheckRocksDbRebuildRoom(const std::string& directory);

// Finishes what the end of the process may have interrupted.
absl::Status FinishRocksDbRebuild(const std::string& directory);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_REBUILD_H_
