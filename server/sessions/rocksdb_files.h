// The files of a RocksDB database that no process has open.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_FILES_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_FILES_H_

#include <rocksdb/db.h>
#include <rocksdb/metadata.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// FAILED_PRECONDITION: it cannot be read; it cannot be written.
absl::StatusOr<std::string> ReadWholeFile(const std::filesystem::path& path);
absl::Status WriteWholeFile(const std::filesystem::path& path, absl::string_view bytes);

// The files whose names end in `extension` (".log", ".sst", ".blob"), by their numbers.
absl::StatusOr<std::vector<std::filesystem::path>> FindRocksDbFiles(const std::string& directory,
                                                                    absl::string_view extension);
// The number in a file's name; 0: there is none.
uint64_t RocksDbFileNumber(const std::filesystem::path& path);

// Whether every write in the logs is whole, but for the end of a log, which a crash may cut off.
absl::StatusOr<bool> RocksDbLogsAreWhole(const std::string& directory);

// The database as it is, whatever of it is damaged; null: not even that can be opened.
std::unique_ptr<rocksdb::DB> OpenRocksDbReadOnly(const std::string& directory);

// What the database says that it consists of.
struct RocksDbManifest {
  std::vector<rocksdb::LiveFileMetaData> tables;
  std::vector<uint64_t> blobs;  // numbers of files
  uint64_t sequence = 0;        // of the last write, with those in the logs
};
// nullopt: that is damaged, or was cut short: a table has later writes.
absl::StatusOr<std::optional<RocksDbManifest>> ReadRocksDbManifest(const std::string& directory);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_FILES_H_
