#include "server/sessions/rocksdb_log.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "server/sessions/rocksdb_checksum.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

namespace mmfree {
namespace {

enum Type : uint8_t { kFull = 1, kFirst = 2, kMiddle = 3, kLast = 4 };

constexpr size_t kChecksumBytes = 4;

struct Record {
  Type type;
  absl::string_view content;
};

// The record that starts the rest of a block; nullopt when none does that is whole.
std::optional<Record> ReadRecord(absl::string_view rest) {
  if (rest.size() < kRocksDbLogHeader) return std::nullopt;
  uint32_t checksum = 0;
  uint16_t size = 0;
  memcpy(&checksum, rest.data(), sizeof(checksum));
  memcpy(&size, rest.data() + kChecksumBytes, sizeof(size));
  const auto type = static_cast<uint8_t>(rest[kRocksDbLogHeader - 1]);
  if (type < kFull || type > kLast || rest.size() < kRocksDbLogHeader + size) return std::nullopt;
  if (RocksDbCrc(rest.substr(kRocksDbLogHeader - 1, size_t{1} + size)) != checksum) {
    return std::nullopt;
  }
  return Record{static_cast<Type>(type), rest.substr(kRocksDbLogHeader, size)};
}

}  // namespace

std::vector<std::string> ReadRocksDbLog(absl::string_view log) {
  std::vector<std::string> writes;
  std::optional<std::string> open;  // a write's first records
  for (; !log.empty(); log.remove_prefix(std::min(log.size(), kRocksDbLogBlock))) {
    absl::string_view block = log.substr(0, kRocksDbLogBlock);
    // A block's end that has no room for a header is no damage.
    while (block.size() >= kRocksDbLogHeader) {
      const std::optional<Record> record = ReadRecord(block);
      if (!record.has_value()) {
        open.reset();
        block.remove_prefix(1);
        continue;
      }
      block.remove_prefix(kRocksDbLogHeader + record->content.size());
      const bool goes_on = record->type == kMiddle || record->type == kLast;
      if (!goes_on) {
        open.emplace(record->content);
      } else if (open.has_value()) {
        open->append(record->content.data(), record->content.size());
      }
      if (record->type != kFull && record->type != kLast) continue;
      if (open.has_value()) writes.push_back(*std::exchange(open, std::nullopt));
    }
  }
  return writes;
}

std::string WriteRocksDbLog(const std::vector<std::string>& writes) {
  std::string log;
  for (absl::string_view rest : writes) {
    for (bool first = true; first || !rest.empty(); first = false) {
      size_t room = kRocksDbLogBlock - log.size() % kRocksDbLogBlock;
      if (room < kRocksDbLogHeader) {
        log.append(room, '\0');
        room = kRocksDbLogBlock;
      }
      const absl::string_view content = rest.substr(0, room - kRocksDbLogHeader);
      rest.remove_prefix(content.size());
      const bool last = rest.empty();
      const uint8_t type = first ? (last ? kFull : kFirst) : (last ? kLast : kMiddle);
      std::string checked(1, static_cast<char>(type));
      checked.append(content.data(), content.size());
      const uint32_t checksum = RocksDbCrc(checked);
      const auto size = static_cast<uint16_t>(content.size());
      log.append(reinterpret_cast<const char*>(&checksum), sizeof(checksum));
      log.append(reinterpret_cast<const char*>(&size), sizeof(size));
      log.append(checked);
    }
  }
  return log;
}

}  // namespace mmfree
