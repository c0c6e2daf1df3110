// The checksums in RocksDB's files.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_CHECKSUM_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_CHECKSUM_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace mmfree {

// Of logs and blob files: CRC-32C, masked as RocksDB stores it.
uint32_t RocksDbCrc(absl::string_view bytes);

// Of a table's block that is not compressed (checksum kXXH3).
uint32_t RocksDbBlockChecksum(absl::string_view block);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_CHECKSUM_H_
