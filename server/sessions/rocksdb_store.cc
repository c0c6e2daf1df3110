#include "server/sessions/rocksdb_store.h"

#include <rocksdb/db.h>
#include <rocksdb/listener.h>
#include <rocksdb/options.h>
#include <rocksdb/write_batch.h>

#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_blob.h"
#include "server/sessions/rocksdb_files.h"
#include "server/sessions/rocksdb_gather.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_open.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

using rocksdb_layout::CheckpointKey;
using rocksdb_layout::CheckpointPrefix;
using rocksdb_layout::EncodeValue;
using rocksdb_layout::kLost;
using rocksdb_layout::kProbe;
using rocksdb_layout::kRecords;
using rocksdb_layout::OwnerPrefix;
using rocksdb_layout::ParseRecordKey;
using rocksdb_layout::RecordKey;

// Of a record's value, as is what follows.
bool IsLost(absl::string_view value) {
  uint64_t ignored_revision = 0;
  absl::Time ignored_time;
  absl::string_view record;
  return rocksdb_layout::DecodeValue(value, &ignored_revision, &ignored_time, &record) &&
         record == kLost;
}

absl::StatusOr<StoredRecord> Decode(absl::string_view value) {
  StoredRecord stored;
  absl::string_view record;
  if (!rocksdb_layout::DecodeValue(value, &stored.revision, &stored.expire_time, &record)) {
    return absl::DataLossError("the session's stored record is damaged: it is cut short");
  }
  if (record == kLost) {
    return absl::DataLossError(
        "the session was lost with a damaged file of the session store; deleting it frees its "
        "name");
  }
  stored.record = std::string(record);
  return stored;
}

// A file that is gone does not come back.
bool IsDamage(const rocksdb::Status& status) {
  return status.IsCorruption() || status.IsPathNotFound();
}

absl::Status FromRocksDb(const rocksdb::Status& status, absl::string_view what) {
  if (status.ok()) return absl::OkStatus();
  const std::string message = absl::StrCat("session store, ", what, ": ", status.ToString());
  if (IsDamage(status)) return absl::DataLossError(message);
  return absl::UnavailableError(message);
}

// A compaction that meets damage, or misses a file, would make RocksDB refuse all writes, for the
// sake of what is lost anyway. Told here that it is no matter, RocksDB goes on; the store then
// turns compaction off.
class DamageWatch final : public rocksdb::EventListener {
 public:
  void OnBackgroundError(rocksdb::BackgroundErrorReason reason, rocksdb::Status* error) override {
    if (reason != rocksdb::BackgroundErrorReason::kCompaction || !IsDamage(*error)) return;
    Log(LogLevel::kError,
        absl::StrCat("session store: damaged, and not compacted any more: ", error->ToString()));
    *error = rocksdb::Status::OK();
    damaged_ = true;
  }

  // Whether damage was met since it was asked last.
  bool TakeDamage() { return damaged_.exchange(false); }

 private:
  std::atomic<bool> damaged_{false};
};

class RocksDbStore final : public SessionStore {
 public:
  RocksDbStore(const RocksDbStoreOptions& options, std::shared_ptr<DamageWatch> damage,
               std::unique_ptr<rocksdb::DB> db)
      : options_(options), damage_(std::move(damage)), db_(std::move(db)) {
    write_.sync = options.sync;
  }

  // A log that was cut off cannot be told from one that a crash has cut off: better there is
  // nothing in it while nobody writes.
  ~RocksDbStore() override {
    if (options_.flush) db_->Flush(rocksdb::FlushOptions()).PermitUncheckedError();
  }

  absl::string_view name() const override { return "rocksdb"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return count_.load(); }
  int64_t lost() const override { return lost_.load(); }

  // Counts the sessions; once, before the store is used. Where it is damaged those behind the place
  // are left out.
  void Count() {
    int64_t count = 0;
    int64_t lost = 0;
    const absl::Status status = Scan(std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
      ++count;
      if (IsLost({it.value().data(), it.value().size()})) ++lost;
      return true;
    });
    if (!status.ok()) Log(LogLevel::kError, status.message());
    count_ = count;
    lost_ = lost;
  }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    const std::string key = RecordKey(name);
    std::string value;
    const rocksdb::Status status = db_->Get(rocksdb::ReadOptions(), key, &value);
    if (IsDamage(status)) {
      // One damaged record does not take with it those in its block.
      MMFREE_ASSIGN_OR_RETURN(std::optional<std::string> found, ReadDamaged(key));
      if (!found.has_value()) return NoSuchSession(name);
      value = *std::move(found);
    } else {
      if (status.IsNotFound()) return NoSuchSession(name);
      MMFREE_RETURN_IF_ERROR(FromRocksDb(status, "reading a record"));
    }
    MMFREE_ASSIGN_OR_RETURN(StoredRecord stored, Decode(value));
    if (stored.expire_time <= options_.clock->Now()) return NoSuchSession(name);
    return stored;
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    auto value = std::make_shared<std::string>();
    const std::string key = CheckpointKey(name, revision);
    const rocksdb::Status status = db_->Get(rocksdb::ReadOptions(), key, value.get());
    if (IsDamage(status)) {
      // It has a checksum of its own.
      MMFREE_ASSIGN_OR_RETURN(std::optional<std::string> found, ReadDamaged(key));
      if (!found.has_value()) return NoSuchCheckpoint(name);
      return std::make_shared<const std::string>(*std::move(found));
    }
    if (status.IsNotFound()) return NoSuchCheckpoint(name);
    MMFREE_RETURN_IF_ERROR(FromRocksDb(status, "reading a checkpoint"));
    return SharedBytes(std::move(value));
  }

  absl::Status Commit(const StoreChange& change) override {
    // Where it is told it may not be changed.
    if (damage_->TakeDamage()) db_->SetOptions({{"disable_auto_compactions", "true"}});
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
    batch.Put(RecordKey(change.name),
              EncodeValue(change.revision, change.expire_time, change.record));
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
    absl::Status present = Read(name).status();
    if (!present.ok() && !absl::IsDataLoss(present)) return present;
    std::string value;
    const bool was_lost =
        db_->Get(rocksdb::ReadOptions(), RecordKey(name), &value).ok() && IsLost(value);
    MMFREE_RETURN_IF_ERROR(DeleteLocked(name));
    if (was_lost) --lost_;
    return absl::OkStatus();
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    const absl::Time now = options_.clock->Now();
    return Scan(OwnerPrefix(kRecords, owner), [&](const rocksdb::Iterator& it) {
      const absl::StatusOr<StoredRecord> stored = Decode({it.value().data(), it.value().size()});
      if (stored.ok() && stored->expire_time > now) visit(*stored);
      return true;
    });
  }

  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    const absl::Time now = options_.clock->Now();
    std::vector<SessionName> expired;
    MMFREE_RETURN_IF_ERROR(Scan(std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
      const absl::StatusOr<StoredRecord> stored = Decode({it.value().data(), it.value().size()});
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

  // The value of a key that RocksDB finds damaged on its way to it, from the tables' bytes: what
  // was written later than those is not damaged. nullopt: it is not there. DATA_LOSS: it is lost,
  // or may be.
  absl::StatusOr<std::optional<std::string>> ReadDamaged(const std::string& key) {
    RocksDbBlobReader blobs(options_.directory);
    RocksDbGather gather([&blobs](absl::string_view place) { return blobs.Read(place); });
    std::vector<rocksdb::LiveFileMetaData> tables;
    db_->GetLiveFilesMetaData(&tables);
    for (const rocksdb::LiveFileMetaData& table : tables) {
      if (key < table.smallestkey || key > table.largestkey) continue;
      const RocksDbGather::TableRange range = {table.smallestkey, table.largestkey,
                                               table.largest_seqno};
      const absl::StatusOr<std::string> file = ReadWholeFile(table.db_path + table.name);
      if (file.ok()) {
        gather.AddTable(*file, range);
      } else {
        gather.AddMissingTable(range);
      }
    }
    if (key[0] != kRecords) return gather.ReadCheckpoint(key);
    RocksDbGather::Found found = gather.Find(key);
    if (!found.there) return std::nullopt;
    if (found.value.has_value()) return found.value;
    return absl::DataLossError(
        "the session's stored record is damaged; when the server starts again it takes from the "
        "store what is not");
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
    read.verify_checksums = false;  // as in Read
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(read));
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      if (!visit(*it)) break;
    }
    return FromRocksDb(it->status(), "scanning");
  }

  const RocksDbStoreOptions options_;
  const std::shared_ptr<DamageWatch> damage_;
  const std::unique_ptr<rocksdb::DB> db_;
  rocksdb::WriteOptions write_;
  std::array<absl::Mutex, 64> locks_;
  std::atomic<int64_t> count_{0};
  std::atomic<int64_t> lost_{0};
};

}  // namespace

absl::StatusOr<std::unique_ptr<SessionStore>> OpenRocksDbStore(const RocksDbStoreOptions& options) {
  const auto damage = std::make_shared<DamageWatch>();
  rocksdb::Options database = rocksdb_layout::Options();
  database.disable_auto_compactions = !options.compact;
  database.listeners.push_back(damage);
  MMFREE_ASSIGN_OR_RETURN(std::unique_ptr<rocksdb::DB> db,
                          OpenRocksDb(database, options.directory));
  auto store = std::make_unique<RocksDbStore>(options, damage, std::move(db));
  store->Count();
  return store;
}

}  // namespace mmfree
