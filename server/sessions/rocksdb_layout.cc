#include "server/sessions/rocksdb_layout.h"

#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/table.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/base/log.h"

namespace mmfree::rocksdb_layout {
namespace {

// States are rewritten at every turn: kept out of the tables, compaction does not copy them.
constexpr uint64_t kMinBlobBytes = 4096;
constexpr size_t kWriteBufferBytes = 16 << 20;
constexpr int kUnlimited = 1 << 30;

void AppendBigEndian(uint64_t value, int bytes, std::string* out) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) {
    out->push_back(static_cast<char>(value >> shift & 0xff));
  }
}

// RocksDB's own log goes to ours. Its default is a file beside the data, and on a full disk the
// failed write of a line into it ends the process (an assertion, in Debian's 7.8).
class RocksDbLog final : public rocksdb::Logger {
 public:
  RocksDbLog() : rocksdb::Logger(rocksdb::WARN_LEVEL) {}

  using rocksdb::Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    std::array<char, 512> line;
    vsnprintf(line.data(), line.size(), format, arguments);
    const absl::string_view text = absl::StripAsciiWhitespace(line.data());
    Log(LogLevel::kWarning, absl::StrCat("rocksdb: ", text));
  }
};

bool ParseName(char kind, const rocksdb::Slice& key, SessionName* name) {
  if (key.size() < kKeyHeader || key[0] != kind) return false;
  size_t owner = 0;
  for (size_t i = 1; i < kKeyHeader; ++i) owner = owner << 8 | static_cast<uint8_t>(key[i]);
  if (key.size() < kKeyHeader + owner) return false;
  name->owner.assign(key.data() + kKeyHeader, owner);
  name->id.assign(key.data() + kKeyHeader + owner, key.size() - kKeyHeader - owner);
  return true;
}

}  // namespace

std::string OwnerPrefix(char kind, const std::string& owner) {
  std::string key(1, kind);
  AppendBigEndian(owner.size(), 4, &key);
  key.append(owner);
  return key;
}

std::string RecordKey(const SessionName& name) {
  return absl::StrCat(OwnerPrefix(kRecords, name.owner), name.id);
}

std::string LostStateKey(const SessionName& name) {
  return absl::StrCat(OwnerPrefix(kLostStates, name.owner), name.id);
}

std::string CheckpointPrefix(const SessionName& name) {
  std::string key = absl::StrCat(OwnerPrefix(kCheckpoints, name.owner), name.id);
  key.push_back('\0');
  return key;
}

std::string CheckpointKey(const SessionName& name, uint64_t revision) {
  std::string key = CheckpointPrefix(name);
  AppendBigEndian(revision, 8, &key);
  return key;
}

bool ParseRecordKey(const rocksdb::Slice& key, SessionName* name) {
  return ParseName(kRecords, key, name);
}

bool ParseCheckpointKey(const rocksdb::Slice& key, SessionName* name) {
  constexpr size_t kEnd = 1 + sizeof(uint64_t);
  if (key.size() < kEnd || key[key.size() - kEnd] != '\0') return false;
  return ParseName(kCheckpoints, {key.data(), key.size() - kEnd}, name);
}

bool IsKey(const rocksdb::Slice& key) {
  SessionName name;
  return ParseRecordKey(key, &name) || ParseCheckpointKey(key, &name) ||
         ParseName(kLostStates, key, &name) || key == kProbe;
}

std::string EncodeValue(uint64_t revision, absl::Time expire_time, absl::string_view record) {
  const int64_t expire =
      expire_time == absl::InfiniteFuture() ? kNever : absl::ToUnixMicros(expire_time);
  std::string value(kValueHeader, '\0');
  memcpy(value.data(), &revision, sizeof(revision));
  memcpy(value.data() + sizeof(revision), &expire, sizeof(expire));
  value.append(record.data(), record.size());
  return value;
}

bool DecodeValue(absl::string_view value, uint64_t* revision, absl::Time* expire_time,
                 absl::string_view* record) {
  if (value.size() < kValueHeader) return false;
  int64_t expire = 0;
  memcpy(revision, value.data(), sizeof(*revision));
  memcpy(&expire, value.data() + sizeof(*revision), sizeof(expire));
  *expire_time = expire == kNever ? absl::InfiniteFuture() : absl::FromUnixMicros(expire);
  *record = value.substr(kValueHeader);
  return true;
}

rocksdb::Options Options() {
  rocksdb::Options options;
  options.create_if_missing = true;
  // A crash leaves at most a last write that had not returned; anything else wrong in the log would
  // be a commit lost in silence, so the store does not open then.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.info_log = std::make_shared<RocksDbLog>();
  // Commits do not wait for compaction, which may be unable to go on until damage is mended; what
  // it has of tables is small.
  options.level0_slowdown_writes_trigger = kUnlimited;
  options.level0_stop_writes_trigger = kUnlimited;
  // So much must be free again before a disk that was full is written to.
  options.write_buffer_size = kWriteBufferBytes;
  options.enable_blob_files = true;
  options.min_blob_size = kMinBlobBytes;
  options.enable_blob_garbage_collection = true;
  options.max_open_files = 512;
  // One that is shorter than it was is found when it is read, and costs what was in its end.
  options.skip_checking_sst_file_sizes_on_db_open = true;
  options.compression = rocksdb::kNoCompression;
  // What rocksdb_table.h reads.
  rocksdb::BlockBasedTableOptions table;
  table.format_version = 5;
  table.checksum = rocksdb::kXXH3;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

}  // namespace mmfree::rocksdb_layout
