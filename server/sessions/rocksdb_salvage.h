// The way past a RocksDB log that is damaged before its end.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_SALVAGE_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_SALVAGE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/sessions/session.h"

namespace mmfree {

struct RocksDbSalvage {
  // How a session differs from what was committed last.
  enum class Loss : uint8_t {
    kBehind,   // an earlier change is its last
    kMissing,  // it is not there
    kBack,     // it had been deleted
  };
  struct Lost {
    SessionName name;
    Loss loss;
  };

  std::string copy;  // directory that has the log as it was, and the list as sessions.txt
  int64_t read = 0;  // sessions with changes in the log
  // Whether changes of sessions that no one can name are missing: the log was cut off or removed.
  bool cut_off = false;
  std::vector<Lost> lost;  // of these; by owner and id
};

// Leaves in the log of the database in `directory` only the writes that are whole, so that the
// store can be opened after this, and compares it with every change whose place in the log can
// still be read. A session whose name itself is damaged there is not found. The log's files are
// copied first, into a new directory within. DATA_LOSS: more than the log is damaged;
// FAILED_PRECONDITION: a file cannot be read or written, or another process has the database.
absl::StatusOr<RocksDbSalvage> SalvageRocksDb(const std::string& directory);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_SALVAGE_H_
