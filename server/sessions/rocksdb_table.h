// What can be read of a RocksDB table that may be damaged anywhere, entry by entry.
//
// A table, as rocksdb_layout.h asks for it (format 5, no compression, XXH3), is a sequence of data
// blocks, some blocks about it, an index of the data blocks, and a footer. A block is entries,
// whose keys leave out what they share with the one before; the places of every 16th entry, which
// has its whole key; their number; then, outside, the compression and a checksum.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_TABLE_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace mmfree {

struct RocksDbEntry {
  enum class Type : uint8_t { kDeletion = 0, kValue = 1, kBlob = 0x11 };
  std::string key;
  uint64_t sequence = 0;  // of the write; the higher the later
  Type type = Type::kValue;
  std::string value;  // of a blob: its place
};

struct RocksDbTable {
  // Blocks whose checksums are wrong, between keys, without them. No `after`: from the beginning;
  // no `before`: to the end.
  struct Damage {
    std::string after;
    std::string before;
    std::vector<RocksDbEntry> entries;  // what looks like them; nothing vouches for what they say
    bool whole = false;                 // there were no others
  };
  std::vector<RocksDbEntry> entries;  // of blocks whose checksum is right, in their order
  std::vector<Damage> damages;
};

// Takes only entries with keys of rocksdb_layout.h.
RocksDbTable ReadRocksDbTable(absl::string_view file);

// Takes a number of up to 64 bits, as RocksDB writes lengths and places, off the front of `bytes`;
// false when there is none.
bool ConsumeRocksDbVarint(absl::string_view* bytes, uint64_t* value);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_TABLE_H_
