// Sessions in a RocksDB database on a local disk: they survive the process.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_STORE_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_STORE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/base/clock.h"
#include "server/sessions/store.h"

namespace mmfree {

struct RocksDbStoreOptions {
  std::string directory;  // made when it does not exist; one process at a time
  // Commits reach the disk before they return. Turned off only by benchmarks.
  bool sync = true;
  // What is in the log goes into tables when the store is closed. Turned off only by tests.
  bool flush = true;
  // Tables are compacted in the background. Turned off only by tests.
  bool compact = true;
  const Clock* clock = Clock::Real();
};

// Concurrent commits share one write of the log. A log that ends in the middle of a write, as a
// crash leaves it, is cut there: that commit had not returned. Other damage costs the
// sessions it hits, which get DATA_LOSS (rocksdb_open.h). FAILED_PRECONDITION: the directory cannot
// be opened (another process has it, or no permission); DATA_LOSS: its log is damaged before its
// end, or lacks changes that were acknowledged.
absl::StatusOr<std::unique_ptr<SessionStore>> OpenRocksDbStore(const RocksDbStoreOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_STORE_H_
