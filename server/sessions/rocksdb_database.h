// A RocksDB database that goes on when its compaction meets damage, and mends it meanwhile.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_DATABASE_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_DATABASE_H_

#include <rocksdb/db.h>
#include <rocksdb/options.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/sessions/rocksdb_mark.h"

namespace mmfree {

class RocksDbWatch;

// A compaction that meets a state that cannot be read, or a file that is gone, fails again and
// again. So the states that cannot be read are taken out, while compaction goes on without looking
// at states; where that does not help, because a table is damaged, the database is written anew
// (rocksdb_rebuild.h). Thread-safe, with a thread of its own for that.
class RocksDbDatabase {
 public:
  struct Mender {
    // Takes out of the database the states that cannot be read, and says how many those were.
    // DATA_LOSS: there is more damage than that; other errors end the attempt, and any is right
    // once `stopped` says so.
    std::function<absl::StatusOr<int64_t>(rocksdb::DB* db, const std::function<bool()>& stopped)>
        take_out_states;
    // The database was written anew, and is not used yet.
    std::function<void(rocksdb::DB* db)> rebuilt;
  };

  // As OpenRocksDb. `compact`: as RocksDbStoreOptions has it.
  static absl::StatusOr<std::unique_ptr<RocksDbDatabase>> Open(const std::string& directory,
                                                               bool compact);
  // Waits for what its thread is doing, which it ends soon unless that is a rebuild.
  ~RocksDbDatabase();
  RocksDbDatabase(const RocksDbDatabase&) = delete;
  RocksDbDatabase& operator=(const RocksDbDatabase&) = delete;

  // What was written until now is on the disk, and who wrote it is told so.
  void Acknowledge(rocksdb::DB* db) { mark_.Raise(db->GetLatestSequenceNumber()); }

  // Starts the thread. Once, at the end of opening.
  void StartMending(Mender mender);

  // The database, which stays open for as long as this lives. Waits a few seconds for one that is
  // being written anew. Not two of one thread at a time.
  class Use {
   public:
    explicit Use(RocksDbDatabase* database);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

    // UNAVAILABLE: it is still being written anew, or that failed.
    absl::Status status() const;
    rocksdb::DB* get() const { return database_->db_.get(); }
    rocksdb::DB* operator->() const { return get(); }

   private:
    RocksDbDatabase* const database_;
  };

 private:
  RocksDbDatabase(std::string directory, rocksdb::Options options,
                  std::shared_ptr<RocksDbWatch> watch, std::unique_ptr<rocksdb::DB> db);

  bool IsOpen() const { return db_ != nullptr; }
  void RunMends();
  // `compaction`: one has met damage since the last time.
  void Mend(bool compaction);
  void Rebuild(const std::string& damage);

  const std::string directory_;
  rocksdb::Options options_;  // of the thread, once that runs
  const std::shared_ptr<RocksDbWatch> watch_;
  Mender mender_;
  RocksDbMark mark_;
  absl::Mutex mutex_;
  // Set and cleared with mutex_ held, used by those who hold it or share it.
  std::unique_ptr<rocksdb::DB> db_;
  std::thread thread_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_DATABASE_H_
