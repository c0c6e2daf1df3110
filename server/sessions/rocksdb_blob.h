// RocksDB's blob files, as its documentation has them: a header (30 bytes), records, and a footer
// (32). A record is the lengths of key and value (8 bytes each), an expiry (8), a checksum of these
// (4), one of key and value (4), key and value. Integers are little-endian.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_BLOB_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_BLOB_H_

#include <cstdint>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// Reads values where tables say that they lie. Not thread-safe.
class RocksDbBlobReader {
 public:
  explicit RocksDbBlobReader(std::string directory) : directory_(std::move(directory)) {}

  // `place`: what a table has instead of the value. nullopt: there is no such place. What is there
  // may be damaged.
  std::optional<std::string> Read(absl::string_view place);

 private:
  struct File {
    std::ifstream stream;
    uint64_t size = 0;
  };

  const std::string directory_;
  std::map<uint64_t, File> files_;  // by number
};

// Gives the file at `path` the header and the footer without which RocksDB reads nothing of it,
// where they are damaged or missing: the footer behind what is there. Says whether it did.
// FAILED_PRECONDITION: it cannot be read or written.
absl::StatusOr<bool> MendRocksDbBlobFile(const std::string& path);

// Calls `visit` for each key in the file's bytes; behind a damaged record it goes on with the next
// place that has a record.
void VisitRocksDbBlobKeys(absl::string_view file,
                          const std::function<void(absl::string_view)>& visit);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_BLOB_H_
