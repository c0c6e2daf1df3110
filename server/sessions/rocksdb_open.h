// Opens a RocksDB database for sessions, whatever of it is damaged but the log.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_

#include <rocksdb/db.h>
#include <rocksdb/options.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace mmfree {

// Reads every table once, and blob files' beginnings and ends. Blob files whose ends are damaged
// get new ones; where a table or the list of files is damaged the database is written anew from
// what can be read (rocksdb_rebuild.h), with a line in the log. DATA_LOSS: the log is damaged
// before its end; FAILED_PRECONDITION: another process has it, or files cannot be read or written.
absl::StatusOr<std::unique_ptr<rocksdb::DB>> OpenRocksDb(const rocksdb::Options& options,
                                                         const std::string& directory);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_OPEN_H_
