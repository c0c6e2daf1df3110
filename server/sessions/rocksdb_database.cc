#include "server/sessions/rocksdb_database.h"

#include <pthread.h>

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_open.h"
#include "server/sessions/rocksdb_rebuild.h"
#include "server/sessions/rocksdb_watch.h"

namespace mmfree {
namespace {

// How long a call waits for a database that is being written anew.
constexpr absl::Duration kPatience = absl::Seconds(5);
// How far a power failure may set back the mark of what was acknowledged.
constexpr absl::Duration kSyncInterval = absl::Seconds(1);

// Without it compactions read no states.
void CollectBlobs(rocksdb::DB* db, bool enable) {
  db->SetOptions({{"enable_blob_garbage_collection", enable ? "true" : "false"}})
      .PermitUncheckedError();
}

// Every table, so that what was taken out is out of all of them.
rocksdb::Status CompactAll(rocksdb::DB* db) {
  rocksdb::CompactRangeOptions compact;
  compact.allow_write_stall = true;
  compact.bottommost_level_compaction = rocksdb::BottommostLevelCompaction::kForce;
  return db->CompactRange(compact, nullptr, nullptr);
}

}  // namespace

RocksDbDatabase::Use::Use(RocksDbDatabase* database) : database_(database) {
  database_->mutex_.ReaderLockWhenWithTimeout(absl::Condition(database_, &RocksDbDatabase::IsOpen),
                                              kPatience);
}

RocksDbDatabase::Use::~Use() { database_->mutex_.ReaderUnlock(); }

absl::Status RocksDbDatabase::Use::status() const {
  if (get() != nullptr) return absl::OkStatus();
  return absl::UnavailableError("session store: damaged, and being written anew");
}

RocksDbDatabase::RocksDbDatabase(std::string directory, rocksdb::Options options,
                                 std::shared_ptr<RocksDbWatch> watch,
                                 std::unique_ptr<rocksdb::DB> db)
    : directory_(std::move(directory)),
      options_(std::move(options)),
      watch_(std::move(watch)),
      mark_(directory_),
      db_(std::move(db)) {}

absl::StatusOr<std::unique_ptr<RocksDbDatabase>> RocksDbDatabase::Open(const std::string& directory,
                                                                       bool compact) {
  auto watch = std::make_shared<RocksDbWatch>();
  rocksdb::Options options = rocksdb_layout::Options();
  options.disable_auto_compactions = !compact;
  options.listeners.push_back(watch);
  MMFREE_ASSIGN_OR_RETURN(OpenedRocksDb opened, OpenRocksDb(options, directory));
  if (opened.states_are_lost) watch->NoteLostStates();
  return std::unique_ptr<RocksDbDatabase>(
      new RocksDbDatabase(directory, std::move(options), std::move(watch), std::move(opened.db)));
}

RocksDbDatabase::~RocksDbDatabase() {
  watch_->Stop();
  if (thread_.joinable()) thread_.join();
}

void RocksDbDatabase::StartMending(Mender mender) {
  mender_ = std::move(mender);
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "mmfree-mend");
    RunMends();
  });
}

void RocksDbDatabase::RunMends() {
  for (;;) {
    const RocksDbWatch::Damage damage = watch_->Await(kSyncInterval);
    mark_.Sync();
    if (damage.stopped) return;
    if (damage.states || damage.compaction) Mend(damage.compaction);
  }
}

void RocksDbDatabase::Mend(bool compaction) {
  // Nobody else closes it.
  if (db_ == nullptr) return;
  CollectBlobs(db_.get(), false);
  const absl::StatusOr<int64_t> states =
      mender_.take_out_states(db_.get(), [this] { return watch_->stopped(); });
  const rocksdb::Status compacted = states.ok() ? CompactAll(db_.get()) : rocksdb::Status();
  if (states.ok() && compacted.ok() && (*states > 0 || !compaction)) {
    watch_->NoteMended();
    CollectBlobs(db_.get(), true);
    if (*states > 0) {
      Log(LogLevel::kError, absl::StrCat("session store: ", *states,
                                         " states that could not be read were taken out of it"));
    }
    return;
  }
  if (states.ok() ? !compacted.ok() && !IsRocksDbDamage(compacted)
                  : !absl::IsDataLoss(states.status())) {
    // The disk is full, or the store is closed: the next compaction says again what is wrong.
    CollectBlobs(db_.get(), true);
    return;
  }
  Rebuild(!states.ok()      ? std::string(states.status().message())
          : !compacted.ok() ? compacted.ToString()
                            : "a compaction has met damage that is not in a session's state");
}

void RocksDbDatabase::Rebuild(const std::string& damage) {
  absl::Status status = CheckRocksDbRebuildRoom(directory_);
  if (status.ok()) {
    Log(LogLevel::kError, absl::StrCat("session store: it is damaged (", damage,
                                       ") and is being written anew; calls wait meanwhile"));
    // While they do not yet.
    db_->Flush(rocksdb::FlushOptions()).PermitUncheckedError();
    std::unique_ptr<rocksdb::DB> db;
    {
      const absl::MutexLock lock(&mutex_);
      db = std::move(db_);
    }
    db->Flush(rocksdb::FlushOptions()).PermitUncheckedError();
    db.reset();
    absl::StatusOr<OpenedRocksDb> opened = OpenRocksDb(options_, directory_, damage);
    mark_.Reset();
    if (opened.ok()) {
      mender_.rebuilt(opened->db.get());
      watch_->NoteMended();
      const absl::MutexLock lock(&mutex_);
      db_ = std::move(opened->db);
      return;
    }
    status = opened.status();
    // As it was.
    rocksdb::DB* again = nullptr;
    const rocksdb::Status reopened = rocksdb::DB::Open(options_, directory_, &again);
    const absl::MutexLock lock(&mutex_);
    db_.reset(again);
    if (!reopened.ok()) status.Update(absl::UnavailableError(reopened.ToString()));
  }
  Log(LogLevel::kError, absl::StrCat("session store: damaged (", damage,
                                     "), and not compacted any more until it "
                                     "can be written anew at a start: ",
                                     status.message()));
  if (db_ != nullptr) {
    db_->SetOptions({{"disable_auto_compactions", "true"}}).PermitUncheckedError();
  }
}

}  // namespace mmfree
