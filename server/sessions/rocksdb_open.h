// Opens a RocksDB database for sessions, whatever of it is damaged but the log.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_

#include <rocksdb/db.h>
#include <rocksdb/options.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace mmfree {

struct OpenedRocksDb {
  std::unique_ptr<rocksdb::DB> db;
  // A blob file is gone, or was cut short: what it held is not taken out of the database.
  bool states_are_lost = false;
};

// Reads every table once, and blob files' beginnings and ends. Blob files whose ends are damaged
// get new ones; where a table or the list of files is damaged the database is written anew from
// what can be read (rocksdb_rebuild.h), with a line in the log. DATA_LOSS: the log is damaged
// before its end, or lacks what was acknowledged; FAILED_PRECONDITION: another process has it, or
// files cannot be read or written. `damage`: what is known to be wrong with it, for which it is
// written anew in any case.
absl::StatusOr<OpenedRocksDb> OpenRocksDb(const rocksdb::Options& options,
                                          const std::string& directory,
                                          std::optional<std::string> damage = std::nullopt);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_
