#include "server/sessions/rocksdb_watch.h"

#include "absl/strings/str_cat.h"
#include "server/base/log.h"

namespace mmfree {
namespace {

// How many mends there had been when this thread's compaction began.
thread_local uint64_t mends_at_begin = 0;

}  // namespace

void RocksDbWatch::OnCompactionBegin(rocksdb::DB*, const rocksdb::CompactionJobInfo&) {
  mends_at_begin = mends_.load();
}

void RocksDbWatch::OnBackgroundError(rocksdb::BackgroundErrorReason reason,
                                     rocksdb::Status* error) {
  if (reason != rocksdb::BackgroundErrorReason::kCompaction || !IsRocksDbDamage(*error)) return;
  const absl::MutexLock lock(&mutex_);
  if (mends_at_begin == mends_.load() && !damage_.compaction) {
    damage_.compaction = true;
    Log(LogLevel::kError,
        absl::StrCat("session store: a compaction has met damage: ", error->ToString()));
  }
  *error = rocksdb::Status::OK();
}

void RocksDbWatch::NoteLostStates() {
  const absl::MutexLock lock(&mutex_);
  damage_.states = true;
}

void RocksDbWatch::Stop() {
  const absl::MutexLock lock(&mutex_);
  damage_.stopped = true;
}

bool RocksDbWatch::stopped() const {
  const absl::MutexLock lock(&mutex_);
  return damage_.stopped;
}

RocksDbWatch::Damage RocksDbWatch::Await(absl::Duration timeout) {
  const absl::MutexLock lock(&mutex_);
  const auto any = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return damage_.stopped || damage_.states || damage_.compaction;
  };
  mutex_.AwaitWithTimeout(absl::Condition(&any), timeout);
  const Damage damage = damage_;
  damage_.states = damage_.compaction = false;
  return damage;
}

void RocksDbWatch::NoteMended() {
  const absl::MutexLock lock(&mutex_);
  ++mends_;
  damage_.compaction = false;
}

}  // namespace mmfree
