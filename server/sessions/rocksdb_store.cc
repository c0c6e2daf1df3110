#include "server/sessions/rocksdb_store.h"

#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

// Keys. N is the owner's length in four bytes, so that no owner's keys are a prefix of another's.
//   'r' N owner id                  -> revision (8 bytes), expiry in microseconds (8), record
//   'c' N owner id '\0' revision    -> checkpoint
//   'p'                             -> what the last probe wrote
// Integers are big-endian in keys and little-endian in values.
constexpr char kRecords = 'r';
constexpr char kCheckpoints = 'c';
constexpr char kProbe[] = "p";
constexpr size_t kValueHeader = 16;
constexpr int64_t kNever = 0;  // as an expiry
// States are rewritten at every turn: kept out of the tables, compaction does not copy them.
constexpr uint64_t kMinBlobBytes = 4096;
constexpr size_t kWriteBufferBytes = 16 << 20;

void AppendBigEndian(uint64_t value, int bytes, std::string* out) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) {
    out->push_back(static_cast<char>(value >> shift & 0xff));
  }
}

std::string OwnerPrefix(char kind, const std::string& owner) {
  std::string key(1, kind);
  AppendBigEndian(owner.size(), 4, &key);
  key.append(owner);
  return key;
}

std::string RecordKey(const SessionName& name) {
  return absl::StrCat(OwnerPrefix(kRecords, name.owner), name.id);
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

std::string EncodeValue(const StoreChange& change) {
  const int64_t expire = change.expire_time == absl::InfiniteFuture()
                             ? kNever
                             : absl::ToUnixMicros(change.expire_time);
  std::string value(kValueHeader, '\0');
  memcpy(value.data(), &change.revision, sizeof(change.revision));
  memcpy(value.data() + sizeof(change.revision), &expire, sizeof(expire));
  value.append(change.record);
  return value;
}

absl::StatusOr<StoredRecord> DecodeValue(const std::string& value) {
  if (value.size() < kValueHeader) {
    return absl::DataLossError("the session's stored record is damaged: it is cut short");
  }
  StoredRecord stored;
  int64_t expire = 0;
  memcpy(&stored.revision, value.data(), sizeof(stored.revision));
  memcpy(&expire, value.data() + sizeof(stored.revision), sizeof(expire));
  if (expire != kNever) stored.expire_time = absl::FromUnixMicros(expire);
  stored.record = value.substr(kValueHeader);
  return stored;
}

absl::Status FromRocksDb(const rocksdb::Status& status, absl::string_view what) {
  if (status.ok()) return absl::OkStatus();
  const std::string message = absl::StrCat("session store, ", what, ": ", status.ToString());
  if (status.IsCorruption()) return absl::DataLossError(message);
  return absl::UnavailableError(message);
}

// The name of a record's key; false when it is not one.
bool ParseRecordKey(const rocksdb::Slice& key, SessionName* name) {
  constexpr size_t kFixed = 5;
  if (key.size() < kFixed || key[0] != kRecords) return false;
  size_t owner = 0;
  for (size_t i = 1; i < kFixed; ++i) owner = owner << 8 | static_cast<uint8_t>(key[i]);
  if (key.size() < kFixed + owner) return false;
  name->owner.assign(key.data() + kFixed, owner);
  name->id.assign(key.data() + kFixed + owner, key.size() - kFixed - owner);
  return true;
}

class RocksDbStore final : public SessionStore {
 public:
  RocksDbStore(const RocksDbStoreOptions& options, std::unique_ptr<rocksdb::DB> db)
      : options_(options), db_(std::move(db)) {
    write_.sync = options.sync;
  }

  absl::string_view name() const override { return "rocksdb"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return count_.load(); }

  // Counts the sessions; once, before the store is used.
  absl::Status Count() {
    int64_t count = 0;
    MMFREE_RETURN_IF_ERROR(Scan(std::string(1, kRecords), [&](const rocksdb::Iterator&) {
      ++count;
      return true;
    }));
    count_ = count;
    return absl::OkStatus();
  }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    std::string value;
    const rocksdb::Status status = db_->Get(rocksdb::ReadOptions(), RecordKey(name), &value);
    if (status.IsNotFound()) return NoSuchSession(name);
    MMFREE_RETURN_IF_ERROR(FromRocksDb(status, "reading a record"));
    MMFREE_ASSIGN_OR_RETURN(StoredRecord stored, DecodeValue(value));
    if (stored.expire_time <= options_.clock->Now()) return NoSuchSession(name);
    return stored;
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    auto value = std::make_shared<std::string>();
    const rocksdb::Status status =
        db_->Get(rocksdb::ReadOptions(), CheckpointKey(name, revision), value.get());
    if (status.IsNotFound()) return NoSuchCheckpoint(name);
    MMFREE_RETURN_IF_ERROR(FromRocksDb(status, "reading a checkpoint"));
    return SharedBytes(std::move(value));
  }

  absl::Status Commit(const StoreChange& change) override {
    absl::MutexLock lock(LockOf(change.name));
    const absl::StatusOr<StoredRecord> present = Read(change.name);
    const bool creates = !change.expected.has_value();
    if (creates) {
      if (present.ok()) return SessionExists(change.name);
      if (!absl::IsNotFound(present.status())) return present.status();
    } else {
      MMFREE_RETURN_IF_ERROR(present.status());
      if (present->revision != *change.expected) return SessionMovedOn(change.name);
    }
    bool replaces_expired = false;
    rocksdb::WriteBatch batch;
    if (creates) {
      std::string ignored;
      replaces_expired = db_->Get(rocksdb::ReadOptions(), RecordKey(change.name), &ignored).ok();
      // What an expired session of that name has left.
      if (replaces_expired) AppendDelete(change.name, &batch);
    }
    batch.Put(RecordKey(change.name), EncodeValue(change));
    if (change.checkpoint != nullptr) {
      batch.Put(CheckpointKey(change.name, change.revision), *change.checkpoint);
    }
    for (const uint64_t revision : change.obsolete) {
      batch.Delete(CheckpointKey(change.name, revision));
    }
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db_->Write(write_, &batch), "committing"));
    if (creates && !replaces_expired) ++count_;
    return absl::OkStatus();
  }

  absl::Status Delete(const SessionName& name) override {
    absl::MutexLock lock(LockOf(name));
    // A damaged one can be deleted too.
    const absl::Status present = Read(name).status();
    if (!present.ok() && !absl::IsDataLoss(present)) return present;
    return DeleteLocked(name);
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    const absl::Time now = options_.clock->Now();
    return Scan(OwnerPrefix(kRecords, owner), [&](const rocksdb::Iterator& it) {
      const absl::StatusOr<StoredRecord> stored = DecodeValue(it.value().ToString());
      if (stored.ok() && stored->expire_time > now) visit(*stored);
      return true;
    });
  }

  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    const absl::Time now = options_.clock->Now();
    std::vector<SessionName> expired;
    MMFREE_RETURN_IF_ERROR(Scan(std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
      const absl::StatusOr<StoredRecord> stored = DecodeValue(it.value().ToString());
      SessionName name;
      if (stored.ok() && stored->expire_time <= now && ParseRecordKey(it.key(), &name)) {
        expired.push_back(std::move(name));
      }
      return static_cast<int64_t>(expired.size()) < limit;
    }));
    int64_t removed = 0;
    for (const SessionName& name : expired) {
      absl::MutexLock lock(LockOf(name));
      // A turn may have given it more time meanwhile, or a new one may have taken its name.
      if (!absl::IsNotFound(Read(name).status())) continue;
      MMFREE_RETURN_IF_ERROR(DeleteLocked(name));
      ++removed;
    }
    return removed;
  }

  absl::Status Probe(int64_t bytes) override {
    const std::string written(static_cast<size_t>(bytes), 'p');
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db_->Put(write_, kProbe, written), "probing"));
    std::string found;
    MMFREE_RETURN_IF_ERROR(
        FromRocksDb(db_->Get(rocksdb::ReadOptions(), kProbe, &found), "probing"));
    if (found != written) {
      return absl::DataLossError("session store: a probe was not read as it was written");
    }
    return absl::OkStatus();
  }

 private:
  // Reads and writes of one session's record are made one change by these.
  absl::Mutex* LockOf(const SessionName& name) {
    return &locks_[absl::HashOf(name.owner, name.id) % locks_.size()];
  }

  static void AppendDelete(const SessionName& name, rocksdb::WriteBatch* batch) {
    batch->Delete(RecordKey(name));
    const std::string begin = CheckpointPrefix(name);
    std::string end = begin;
    end.back() = '\1';
    batch->DeleteRange(begin, end);
  }

  absl::Status DeleteLocked(const SessionName& name) {
    rocksdb::WriteBatch batch;
    AppendDelete(name, &batch);
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db_->Write(write_, &batch), "deleting"));
    --count_;
    return absl::OkStatus();
  }

  // Calls `visit` for each key with `prefix`, in order, until it returns false.
  template <typename Visit>
  absl::Status Scan(const std::string& prefix, const Visit& visit) {
    rocksdb::ReadOptions read;
    read.fill_cache = false;
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(read));
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      if (!visit(*it)) break;
    }
    return FromRocksDb(it->status(), "scanning");
  }

  const RocksDbStoreOptions options_;
  const std::unique_ptr<rocksdb::DB> db_;
  rocksdb::WriteOptions write_;
  std::array<absl::Mutex, 64> locks_;
  std::atomic<int64_t> count_{0};
};

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

rocksdb::Options DatabaseOptions() {
  rocksdb::Options options;
  options.create_if_missing = true;
  // A crash leaves at most a last write that had not returned; anything else wrong in the log would
  // be a commit lost in silence, so the store does not open then.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.info_log = std::make_shared<RocksDbLog>();
  // So much must be free again before a disk that was full is written to.
  options.write_buffer_size = kWriteBufferBytes;
  options.enable_blob_files = true;
  options.min_blob_size = kMinBlobBytes;
  options.enable_blob_garbage_collection = true;
  options.max_open_files = 512;
  options.compression = rocksdb::kNoCompression;
  rocksdb::BlockBasedTableOptions table;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SessionStore>> OpenRocksDbStore(const RocksDbStoreOptions& options) {
  rocksdb::DB* opened = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(DatabaseOptions(), options.directory, &opened);
  if (!status.ok()) {
    const std::string message =
        absl::StrCat("session store rocksdb:", options.directory, ": ", status.ToString());
    return status.IsCorruption() ? absl::DataLossError(message)
                                 : absl::FailedPreconditionError(message);
  }
  auto store = std::make_unique<RocksDbStore>(options, std::unique_ptr<rocksdb::DB>(opened));
  MMFREE_RETURN_IF_ERROR(store->Count());
  return store;
}

}  // namespace mmfree
