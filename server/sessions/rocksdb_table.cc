#include "server/sessions/rocksdb_table.h"

#include <cstddef>
#include <cstring>
#include <optional>
#include <utility>

#include "server/sessions/rocksdb_checksum.h"
#include "server/sessions/rocksdb_layout.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

namespace mmfree {
namespace {

constexpr size_t kRestartInterval = 16;
constexpr size_t kTrailerBytes = 5;  // behind a block: its compression and its checksum
constexpr size_t kFooterBytes = 53;
constexpr uint64_t kMagic = 0x88e241b785f4cff7;
constexpr size_t kTagBytes = 8;  // behind a key: type (1), sequence (7)

struct Block {
  size_t end = 0;  // behind its trailer
  std::vector<RocksDbEntry> entries;
};

uint32_t ReadWord(absl::string_view bytes, size_t at) {
  uint32_t word = 0;
  memcpy(&word, bytes.data() + at, sizeof(word));
  return word;
}

// Whether the block of `size` at `at` and its trailer are in the file, and as they were written.
bool ChecksumIsRight(absl::string_view file, size_t at, size_t size) {
  if (size > file.size() || at > file.size() - size || file.size() - at - size < kTrailerBytes) {
    return false;
  }
  return file[at + size] == 0 &&
         ReadWord(file, at + size + 1) == RocksDbBlockChecksum(file.substr(at, size));
}

// Reads the entry that starts at `*at`, whose key goes on from `*tagged_key`, that of the entry
// before; moves both to it. False: none does.
bool ReadEntry(absl::string_view file, size_t* at, std::string* tagged_key, RocksDbEntry* entry) {
  absl::string_view rest = file.substr(*at);
  uint64_t shared = 0;
  uint64_t added = 0;
  uint64_t size = 0;
  if (!ConsumeRocksDbVarint(&rest, &shared) || !ConsumeRocksDbVarint(&rest, &added) ||
      !ConsumeRocksDbVarint(&rest, &size) || shared > tagged_key->size() || added > rest.size() ||
      size > rest.size() - added || shared + added <= kTagBytes) {
    return false;
  }
  // Most places where nothing starts end here.
  if (shared == 0 && !rocksdb_layout::MayStartKey(rest[0])) return false;
  std::string key = tagged_key->substr(0, shared);
  key.append(rest.data(), added);
  uint64_t tag = 0;
  memcpy(&tag, key.data() + key.size() - kTagBytes, sizeof(tag));
  entry->type = static_cast<RocksDbEntry::Type>(tag & 0xff);
  entry->sequence = tag >> 8;
  entry->key = key.substr(0, key.size() - kTagBytes);
  if ((entry->type != RocksDbEntry::Type::kDeletion && entry->type != RocksDbEntry::Type::kValue &&
       entry->type != RocksDbEntry::Type::kBlob) ||
      !rocksdb_layout::IsKey(entry->key)) {
    return false;
  }
  entry->value.assign(rest.data() + added, size);
  *tagged_key = std::move(key);
  *at = static_cast<size_t>(rest.data() - file.data()) + added + size;
  return true;
}

// The data block that starts at `at`; nullopt when none does that has the right shape and, unless
// that is not asked for, the right checksum.
std::optional<Block> ReadBlock(absl::string_view file, size_t at, bool checked = true) {
  Block block;
  std::string tagged_key;
  size_t end = at;
  // The first of the places is 0, which starts no entry.
  while (end + sizeof(uint32_t) <= file.size() && ReadWord(file, end) != 0) {
    if (!ReadEntry(file, &end, &tagged_key, &block.entries.emplace_back())) return std::nullopt;
  }
  const size_t restarts = (block.entries.size() + kRestartInterval - 1) / kRestartInterval;
  end += restarts * sizeof(uint32_t);
  if (restarts == 0 || end + sizeof(uint32_t) > file.size() || ReadWord(file, end) != restarts ||
      (checked && !ChecksumIsRight(file, at, end + sizeof(uint32_t) - at))) {
    return std::nullopt;
  }
  block.end = end + sizeof(uint32_t) + kTrailerBytes;
  return block;
}

// Where the data blocks end, as the index has it; nullopt when it is damaged.
std::optional<size_t> DataEnd(absl::string_view file) {
  if (file.size() < kFooterBytes) return std::nullopt;
  absl::string_view footer = file.substr(file.size() - kFooterBytes);
  uint64_t magic = 0;
  memcpy(&magic, footer.data() + kFooterBytes - sizeof(magic), sizeof(magic));
  footer.remove_prefix(1);  // the kind of checksum
  uint64_t ignored = 0;
  uint64_t begin = 0;
  uint64_t size = 0;
  if (magic != kMagic || !ConsumeRocksDbVarint(&footer, &ignored) ||
      !ConsumeRocksDbVarint(&footer, &ignored) || !ConsumeRocksDbVarint(&footer, &begin) ||
      !ConsumeRocksDbVarint(&footer, &size) || size < 2 * sizeof(uint32_t) ||
      !ChecksumIsRight(file, begin, size)) {
    return std::nullopt;
  }
  // Each entry of it is at a place of its own, and has no length: lengths of what is shared (0) and
  // of the key, the key, the block's place and size.
  const absl::string_view index = file.substr(begin, size);
  const size_t restarts = ReadWord(index, size - sizeof(uint32_t));
  if (restarts == 0 || restarts >= size / sizeof(uint32_t)) return std::nullopt;
  const size_t places = size - (restarts + 1) * sizeof(uint32_t);
  const size_t last = ReadWord(index, size - 2 * sizeof(uint32_t));
  if (places == 0) return 0;  // a table of range deletions alone
  if (last >= places) return std::nullopt;
  absl::string_view entry = index.substr(last, places - last);
  uint64_t key = 0;
  if (!ConsumeRocksDbVarint(&entry, &ignored) || !ConsumeRocksDbVarint(&entry, &key) ||
      key > entry.size()) {
    return std::nullopt;
  }
  entry.remove_prefix(key);
  if (!ConsumeRocksDbVarint(&entry, &begin) || !ConsumeRocksDbVarint(&entry, &size)) {
    return std::nullopt;
  }
  const size_t end = begin + size + kTrailerBytes;
  return end <= file.size() ? std::optional(end) : std::nullopt;
}

// Adds what looks like entries between `at` and `end`.
void ReadDamaged(absl::string_view file, size_t at, size_t end,
                 std::vector<RocksDbEntry>* entries) {
  while (at < end) {
    std::string tagged_key;
    const size_t begin = at;
    for (RocksDbEntry entry; at < end && ReadEntry(file, &at, &tagged_key, &entry);) {
      entries->push_back(entry);
    }
    if (at == begin) ++at;
  }
}

}  // namespace

bool ConsumeRocksDbVarint(absl::string_view* bytes, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64 && !bytes->empty(); shift += 7) {
    const auto byte = static_cast<unsigned char>(bytes->front());
    bytes->remove_prefix(1);
    *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

RocksDbTable ReadRocksDbTable(absl::string_view file) {
  RocksDbTable table;
  const std::optional<size_t> data_end = DataEnd(file);
  const size_t end = data_end.value_or(file.size());
  const auto begin_damage = [&table] {
    table.damages.emplace_back().after = table.entries.empty() ? "" : table.entries.back().key;
  };
  for (size_t at = 0; at < end;) {
    std::optional<Block> block = ReadBlock(file, at);
    if (!block.has_value()) {
      begin_damage();
      RocksDbTable::Damage& damage = table.damages.back();
      std::optional<Block> damaged = ReadBlock(file, at, /*checked=*/false);
      damage.whole = damaged.has_value() &&
                     (damaged->end == data_end || ReadBlock(file, damaged->end).has_value());
      if (damage.whole) {
        damage.entries = std::move(damaged->entries);
        at = damaged->end;
      } else {
        size_t next = at + 1;
        while (next < end && !ReadBlock(file, next).has_value()) ++next;
        ReadDamaged(file, at, next, &damage.entries);
        at = next;
      }
      if (at >= end) break;
      block = ReadBlock(file, at);
      damage.before = block->entries.front().key;
    }
    for (RocksDbEntry& entry : block->entries) table.entries.push_back(std::move(entry));
    at = block->end;
  }
  if (!data_end.has_value() && (table.damages.empty() || !table.damages.back().before.empty())) {
    begin_damage();
  }
  return table;
}

}  // namespace mmfree
