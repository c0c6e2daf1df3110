#include "server/sessions/rocksdb_store.h"

#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/write_batch.h>

#include <array>
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_database.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_mend.h"
#include "server/sessions/rocksdb_watch.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

using rocksdb_layout::CheckpointKey;
using rocksdb_layout::CheckpointPrefix;
using rocksdb_layout::EncodeValue;
using rocksdb_layout::kLost;
using rocksdb_layout::kLostStates;
using rocksdb_layout::kProbe;
using rocksdb_layout::kRecords;
using rocksdb_layout::LostStateKey;
using rocksdb_layout::OwnerPrefix;
using rocksdb_layout::ParseRecordKey;
using rocksdb_layout::RecordKey;

// As many lost sessions have their names in the log.
constexpr int64_t kNamedLosses = 100;

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

absl::Status FromRocksDb(const rocksdb::Status& status, absl::string_view what) {
  if (status.ok()) return absl::OkStatus();
  const std::string message = absl::StrCat("session store, ", what, ": ", status.ToString());
  if (IsRocksDbDamage(status)) return absl::DataLossError(message);
  return absl::UnavailableError(message);
}

class RocksDbStore final : public SessionStore {
 public:
  explicit RocksDbStore(const RocksDbStoreOptions& options) : options_(options) {
    write_.sync = options.sync;
  }

  // A log that was cut off cannot be told from one that a crash has cut off: better there is
  // nothing in it while nobody writes.
  ~RocksDbStore() override {
    if (database_ == nullptr || !options_.flush) return;
    const RocksDbDatabase::Use db(database_.get());
    if (db.status().ok()) db->Flush(rocksdb::FlushOptions()).PermitUncheckedError();
  }

  // Once, before the store is used.
  absl::Status Open() {
    MMFREE_ASSIGN_OR_RETURN(database_, RocksDbDatabase::Open(options_.directory, options_.compact));
    Count(RocksDbDatabase::Use(database_.get()).get());
    database_->StartMending(
        {.take_out_states = [this](auto* db,
                                   const auto& stopped) { return TakeOutStates(db, stopped); },
         .rebuilt = [this](auto* db) { Count(db); }});
    return absl::OkStatus();
  }

  absl::string_view name() const override { return "rocksdb"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return count_.load(); }
  int64_t lost() const override {
    const absl::MutexLock lock(&lost_mutex_);
    return lost_records_ + static_cast<int64_t>(lost_states_.size());
  }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    return ReadWith(db.get(), name);
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    auto value = std::make_shared<std::string>();
    const std::string key = CheckpointKey(name, revision);
    rocksdb::Status status = db->Get(rocksdb::ReadOptions(), key, value.get());
    if (status.IsNotFound() || IsRocksDbDamage(status)) {
      // A state that has come to be lost is so for good, and known to be.
      MMFREE_RETURN_IF_ERROR(MendSession(db.get(), name, std::nullopt).status());
      status = db->Get(rocksdb::ReadOptions(), key, value.get());
    }
    if (status.IsNotFound()) return NoSuchCheckpoint(name);
    MMFREE_RETURN_IF_ERROR(FromRocksDb(status, "reading a checkpoint"));
    return SharedBytes(std::move(value));
  }

  absl::Status Commit(const StoreChange& change) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    const absl::MutexLock lock(LockOf(change.name));
    const absl::StatusOr<StoredRecord> present = ReadWith(db.get(), change.name);
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
      replaces_expired = db->Get(rocksdb::ReadOptions(), RecordKey(change.name), &ignored).ok();
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
    // It is at another turn now.
    const bool was_lost = StateIsLost(change.name);
    if (was_lost) batch.Delete(LostStateKey(change.name));
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Write(write_, &batch), "committing"));
    if (write_.sync) database_->Acknowledge(db.get());
    if (was_lost) SetStateLost(change.name, false);
    if (creates && !replaces_expired) ++count_;
    return absl::OkStatus();
  }

  absl::Status Delete(const SessionName& name) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    const absl::MutexLock lock(LockOf(name));
    // A damaged one can be deleted too.
    absl::Status present = ReadWith(db.get(), name).status();
    if (!present.ok() && !absl::IsDataLoss(present)) return present;
    std::string value;
    const bool was_lost =
        db->Get(rocksdb::ReadOptions(), RecordKey(name), &value).ok() && IsLost(value);
    MMFREE_RETURN_IF_ERROR(DeleteLocked(db.get(), name));
    if (was_lost) {
      const absl::MutexLock lost(&lost_mutex_);
      --lost_records_;
    }
    return absl::OkStatus();
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    const absl::Time now = options_.clock->Now();
    return Scan(db.get(), OwnerPrefix(kRecords, owner), [&](const rocksdb::Iterator& it) {
      const absl::StatusOr<StoredRecord> stored = Decode({it.value().data(), it.value().size()});
      if (stored.ok() && stored->expire_time > now) visit(*stored);
      return true;
    });
  }

  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    const absl::Time now = options_.clock->Now();
    std::vector<SessionName> expired;
    MMFREE_RETURN_IF_ERROR(
        Scan(db.get(), std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
          const absl::StatusOr<StoredRecord> stored =
              Decode({it.value().data(), it.value().size()});
          SessionName name;
          if (stored.ok() && stored->expire_time <= now && ParseRecordKey(it.key(), &name)) {
            expired.push_back(std::move(name));
          }
          return static_cast<int64_t>(expired.size()) < limit;
        }));
    int64_t removed = 0;
    for (const SessionName& name : expired) {
      const absl::MutexLock lock(LockOf(name));
      // A turn may have given it more time meanwhile, or a new one may have taken its name.
      if (!absl::IsNotFound(ReadWith(db.get(), name).status())) continue;
      MMFREE_RETURN_IF_ERROR(DeleteLocked(db.get(), name));
      ++removed;
    }
    return removed;
  }

  absl::Status Probe(int64_t bytes) override {
    const RocksDbDatabase::Use db(database_.get());
    MMFREE_RETURN_IF_ERROR(db.status());
    const std::string written(static_cast<size_t>(bytes), 'p');
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Put(write_, kProbe, written), "probing"));
    std::string found;
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Get(rocksdb::ReadOptions(), kProbe, &found), "probing"));
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

  absl::StatusOr<StoredRecord> ReadWith(rocksdb::DB* db, const SessionName& name) {
    const std::string key = RecordKey(name);
    std::string value;
    const rocksdb::Status status = db->Get(rocksdb::ReadOptions(), key, &value);
    if (IsRocksDbDamage(status)) {
      // One damaged record does not take with it those in its block. What was written later than
      // the tables is not damaged.
      MMFREE_ASSIGN_OR_RETURN(std::optional<std::string> found,
                              RocksDbRawReader(db, options_.directory, key).ReadRecord(key));
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

  // Counts the sessions, and those that are lost, while nobody uses the database. Where it is
  // damaged those behind the place are left out.
  void Count(rocksdb::DB* db) {
    int64_t count = 0;
    int64_t lost = 0;
    absl::Status status = Scan(db, std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
      ++count;
      if (IsLost({it.value().data(), it.value().size()})) ++lost;
      return true;
    });
    absl::flat_hash_set<std::string> lost_states;
    status.Update(Scan(db, std::string(1, kLostStates), [&](const rocksdb::Iterator& it) {
      lost_states.insert(it.key().ToString());
      return true;
    }));
    if (!status.ok()) Log(LogLevel::kError, status.message());
    count_ = count;
    const absl::MutexLock lock(&lost_mutex_);
    lost_records_ = lost;
    lost_states_ = std::move(lost_states);
  }

  bool StateIsLost(const SessionName& name) {
    const absl::MutexLock lock(&lost_mutex_);
    return !lost_states_.empty() && lost_states_.contains(LostStateKey(name));
  }
  void SetStateLost(const SessionName& name, bool lost) {
    const absl::MutexLock lock(&lost_mutex_);
    if (lost) {
      lost_states_.insert(LostStateKey(name));
    } else {
      lost_states_.erase(LostStateKey(name));
    }
  }

  // Takes out of a session what cannot be read of its states, and says of how many. `raw`: of all
  // tables, made when there is need for it; nullopt: it is made for this session.
  absl::StatusOr<int64_t> MendSession(
      rocksdb::DB* db, const SessionName& name,
      std::optional<std::reference_wrapper<std::optional<RocksDbRawReader>>> raw) {
    const auto read = [&](const std::string& key) {
      if (!raw.has_value())
        return RocksDbRawReader(db, options_.directory, key).ReadCheckpoint(key);
      std::optional<RocksDbRawReader>& all = raw->get();
      if (!all.has_value()) all.emplace(db, options_.directory, std::nullopt);
      return all->ReadCheckpoint(key);
    };
    const absl::MutexLock lock(LockOf(name));
    rocksdb::WriteBatch batch;
    MMFREE_ASSIGN_OR_RETURN(const MendedStates mended, MendRocksDbStates(db, name, read, &batch));
    const bool is_known = StateIsLost(name);
    if (mended.mended == 0 && (is_known || !mended.present_lost)) return 0;
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Write(write_, &batch), "mending"));
    if (mended.present_lost && !is_known) {
      SetStateLost(name, true);
      if (lost() <= kNamedLosses) {
        Log(LogLevel::kError,
            absl::StrCat("session store: the state of session \"", absl::CHexEscape(name.owner),
                         "\"/\"", name.id, "\" is lost"));
      }
    }
    return mended.mended;
  }

  // The same of all sessions.
  absl::StatusOr<int64_t> TakeOutStates(rocksdb::DB* db, const std::function<bool()>& stopped) {
    int64_t mended = 0;
    absl::Status status;
    std::optional<RocksDbRawReader> raw;
    std::string probe;
    if (IsRocksDbDamage(db->Get(rocksdb::ReadOptions(), kProbe, &probe))) {
      MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Delete(write_, kProbe), "mending"));
      ++mended;
    }
    status.Update(Scan(db, std::string(1, kRecords), [&](const rocksdb::Iterator& it) {
      SessionName name;
      if (!ParseRecordKey(it.key(), &name)) return true;
      const absl::StatusOr<int64_t> states =
          stopped() ? absl::CancelledError("closed") : MendSession(db, name, std::ref(raw));
      if (states.ok()) mended += *states;
      status = states.status();
      return states.ok();
    }));
    MMFREE_RETURN_IF_ERROR(status);
    return mended;
  }

  static void AppendDelete(const SessionName& name, rocksdb::WriteBatch* batch) {
    batch->Delete(RecordKey(name));
    const std::string begin = CheckpointPrefix(name);
    std::string end = begin;
    end.back() = '\1';
    batch->DeleteRange(begin, end);
  }

  absl::Status DeleteLocked(rocksdb::DB* db, const SessionName& name) {
    rocksdb::WriteBatch batch;
    AppendDelete(name, &batch);
    const bool was_lost = StateIsLost(name);
    if (was_lost) batch.Delete(LostStateKey(name));
    MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Write(write_, &batch), "deleting"));
    if (write_.sync) database_->Acknowledge(db);
    if (was_lost) SetStateLost(name, false);
    --count_;
    return absl::OkStatus();
  }

  // Calls `visit` for each key with `prefix`, in order, until it returns false.
  template <typename Visit>
  absl::Status Scan(rocksdb::DB* db, const std::string& prefix, const Visit& visit) {
    rocksdb::ReadOptions read;
    read.fill_cache = false;
    read.verify_checksums = false;  // as in Read
    const std::unique_ptr<rocksdb::Iterator> it(db->NewIterator(read));
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      if (!visit(*it)) break;
    }
    return FromRocksDb(it->status(), "scanning");
  }

  const RocksDbStoreOptions options_;
  rocksdb::WriteOptions write_;
  std::array<absl::Mutex, 64> locks_;
  std::atomic<int64_t> count_{0};
  // Sessions whose records say so, and the keys of those whose present checkpoints are gone.
  mutable absl::Mutex lost_mutex_;
  int64_t lost_records_ ABSL_GUARDED_BY(lost_mutex_) = 0;
  absl::flat_hash_set<std::string> lost_states_ ABSL_GUARDED_BY(lost_mutex_);
  std::unique_ptr<RocksDbDatabase> database_;  // its thread uses what is above
};

}  // namespace

absl::StatusOr<std::unique_ptr<SessionStore>> OpenRocksDbStore(const RocksDbStoreOptions& options) {
  auto store = std::make_unique<RocksDbStore>(options);
  MMFREE_RETURN_IF_ERROR(store->Open());
  return store;
}

}  // namespace mmfree
