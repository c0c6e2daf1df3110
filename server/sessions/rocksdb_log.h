// The framing of RocksDB's write-ahead log, as its documentation has it: blocks of 32 KiB, in them
// records of a masked CRC-32C (4 bytes), a length (2) and a type (1), all little-endian, and their
// content; a write that does not fit into a block is several records.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_LOG_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_LOG_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace mmfree {

inline constexpr size_t kRocksDbLogBlock = 32 << 10;
inline constexpr size_t kRocksDbLogHeader = 7;

// The writes that are whole, in their order. Behind a damaged record it goes on with the next place
// whose checksum is right.
std::vector<std::string> ReadRocksDbLog(absl::string_view log);

// A log of these writes.
std::string WriteRocksDbLog(const std::vector<std::string>& writes);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_LOG_H_
