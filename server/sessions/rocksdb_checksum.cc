#include "server/sessions/rocksdb_checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>

namespace mmfree {
namespace {

std::array<uint32_t, 256> MakeTable() {
  constexpr uint32_t kCastagnoli = 0x82f63b78;
  std::array<uint32_t, 256> table;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? kCastagnoli : 0);
    table[byte] = crc;
  }
  return table;
}

}  // namespace

uint32_t RocksDbCrc(absl::string_view bytes) {
  static const std::array<uint32_t, 256> table = MakeTable();
  uint32_t crc = ~0u;
  for (const char byte : bytes) {
    crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  }
  crc = ~crc;
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

uint32_t RocksDbBlockChecksum(absl::string_view block) {
  return static_cast<uint32_t>(XXH3_64bits(block.data(), block.size()));
}

}  // namespace mmfree
