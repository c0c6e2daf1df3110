#include "server/sessions/rocksdb_blob.h"

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/sessions/rocksdb_checksum.h"
#include "server/sessions/rocksdb_table.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

namespace mmfree {
namespace {

constexpr uint32_t kMagic = 2395959;
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 30;
constexpr size_t kFooterBytes = 32;
constexpr size_t kRecordHeaderBytes = 32;
constexpr size_t kLengths = 24;  // what the header's checksum is of
constexpr char kBlob = 1;        // the kind of a place

// Of a file without compression and without expiry, in the only column family.
std::string Header() {
  std::string header(kHeaderBytes, '\0');
  memcpy(&header[0], &kMagic, sizeof(kMagic));
  memcpy(&header[4], &kVersion, sizeof(kVersion));
  return header;
}

// The number of blobs in it is for people only.
std::string Footer() {
  std::string footer(kFooterBytes, '\0');
  memcpy(&footer[0], &kMagic, sizeof(kMagic));
  const uint32_t checksum =
      RocksDbCrc(absl::string_view(footer).substr(0, kFooterBytes - sizeof(uint32_t)));
  memcpy(&footer[kFooterBytes - sizeof(checksum)], &checksum, sizeof(checksum));
  return footer;
}

bool IsFooter(absl::string_view bytes) {
  uint32_t checksum = 0;
  memcpy(&checksum, bytes.data() + kFooterBytes - sizeof(checksum), sizeof(checksum));
  return memcmp(bytes.data(), &kMagic, sizeof(kMagic)) == 0 &&
         checksum == RocksDbCrc(bytes.substr(0, kFooterBytes - sizeof(checksum)));
}

}  // namespace

std::optional<std::string> RocksDbBlobReader::Read(absl::string_view place) {
  uint64_t number = 0;
  uint64_t offset = 0;
  uint64_t size = 0;
  if (place.empty() || place[0] != kBlob) return std::nullopt;
  place.remove_prefix(1);
  if (!ConsumeRocksDbVarint(&place, &number) || !ConsumeRocksDbVarint(&place, &offset) ||
      !ConsumeRocksDbVarint(&place, &size)) {
    return std::nullopt;
  }
  const auto [entry, is_new] = files_.try_emplace(number);
  File& file = entry->second;
  if (is_new) {
    const std::string path =
        absl::StrCat(directory_, "/", absl::Dec(number, absl::kZeroPad6), ".blob");
    std::error_code error;
    file.size = std::filesystem::file_size(path, error);
    if (error) file.size = 0;
    file.stream.open(path, std::ios::binary);
  }
  if (offset > file.size || size > file.size - offset) return std::nullopt;
  std::string value(size, '\0');
  file.stream.clear();
  file.stream.seekg(static_cast<std::streamoff>(offset));
  file.stream.read(value.data(), static_cast<std::streamsize>(size));
  if (!file.stream.good()) return std::nullopt;
  return value;
}

absl::StatusOr<bool> MendRocksDbBlobFile(const std::string& path) {
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(path, error);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  std::string header(kHeaderBytes, '\0');
  std::string footer(kFooterBytes, '\0');
  if (size >= kHeaderBytes + kFooterBytes) {
    file.read(header.data(), kHeaderBytes);
    file.seekg(static_cast<std::streamoff>(size - kFooterBytes));
    file.read(footer.data(), kFooterBytes);
  }
  if (error || !file.good()) {
    return absl::FailedPreconditionError(absl::StrCat("cannot read and write ", path));
  }
  const bool has_header = header == Header();
  const bool has_footer = IsFooter(footer);
  if (!has_header) file.seekp(0) << Header();
  if (!has_footer) file.seekp(0, std::ios::end) << Footer();
  if (!file.flush().good()) {
    return absl::FailedPreconditionError(absl::StrCat("cannot write ", path));
  }
  return !has_header || !has_footer;
}

void VisitRocksDbBlobKeys(absl::string_view file,
                          const std::function<void(absl::string_view)>& visit) {
  for (size_t at = kHeaderBytes; at < file.size() && file.size() - at > kRecordHeaderBytes;) {
    const absl::string_view record = file.substr(at);
    uint64_t key = 0;
    uint64_t value = 0;
    uint64_t expiry = 0;
    memcpy(&key, record.data(), sizeof(key));
    memcpy(&value, record.data() + sizeof(key), sizeof(value));
    memcpy(&expiry, record.data() + 2 * sizeof(key), sizeof(expiry));
    const size_t room = record.size() - kRecordHeaderBytes;
    uint32_t checksum = 0;
    memcpy(&checksum, record.data() + kLengths, sizeof(checksum));
    // The value may be cut off.
    if (expiry != 0 || key > room || checksum != RocksDbCrc(record.substr(0, kLengths))) {
      ++at;
      continue;
    }
    visit(record.substr(kRecordHeaderBytes, key));
    at = value > room - key ? file.size() : at + kRecordHeaderBytes + key + value;
  }
}

}  // namespace mmfree
