#include "server/sessions/memory_store.h"

#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

class MemoryStore final : public SessionStore {
 public:
  explicit MemoryStore(const MemoryStoreOptions& options) : options_(options) {}

  absl::string_view name() const override { return "memory"; }
  bool in_memory() const override { return true; }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    const absl::Time now = options_.clock->Now();
    absl::MutexLock lock(&mutex_);
    const Entry* const entry = Find(name, now);
    if (entry == nullptr) return NoSuchSession(name);
    return entry->stored;
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    const absl::Time now = options_.clock->Now();
    absl::MutexLock lock(&mutex_);
    const Entry* const entry = Find(name, now);
    if (entry == nullptr) return NoSuchSession(name);
    for (const auto& [key, bytes] : entry->checkpoints) {
      if (key == revision) return bytes;
    }
    return NoSuchCheckpoint(name);
  }

  absl::Status Commit(const StoreChange& change) override {
    const absl::Time now = options_.clock->Now();
    absl::MutexLock lock(&mutex_);
    Entry* entry = Find(change.name, now);
    if (!change.expected.has_value()) {
      if (entry != nullptr) return SessionExists(change.name);
      if (bytes_ >= options_.max_bytes) {
        return absl::ResourceExhaustedError(
            absl::StrCat("sessions take ", bytes_, " bytes of memory, the limit is ",
                         options_.max_bytes, " (--session_memory_mb)"));
      }
      Erase(change.name);  // an expired one
      entry = &sessions_[change.name.owner][change.name.id];
      ++count_;
    } else {
      if (entry == nullptr) return NoSuchSession(change.name);
      if (entry->stored.revision != *change.expected) return SessionMovedOn(change.name);
    }
    bytes_ -= BytesOf(*entry);
    entry->stored = {change.revision, change.expire_time, change.record};
    for (const uint64_t revision : change.obsolete) {
      std::erase_if(entry->checkpoints,
                    [revision](const auto& checkpoint) { return checkpoint.first == revision; });
    }
    if (change.checkpoint != nullptr) {
      entry->checkpoints.emplace_back(change.revision, change.checkpoint);
    }
    bytes_ += BytesOf(*entry);
    return absl::OkStatus();
  }

  absl::Status Delete(const SessionName& name) override {
    const absl::Time now = options_.clock->Now();
    absl::MutexLock lock(&mutex_);
    if (Find(name, now) == nullptr) return NoSuchSession(name);
    Erase(name);
    return absl::OkStatus();
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    const absl::Time now = options_.clock->Now();
    std::vector<StoredRecord> records;
    {
      absl::MutexLock lock(&mutex_);
      const auto found = sessions_.find(owner);
      if (found == sessions_.end()) return absl::OkStatus();
      for (const auto& [id, entry] : found->second) {
        if (entry.stored.expire_time > now) records.push_back(entry.stored);
      }
    }
    for (const StoredRecord& record : records) visit(record);
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    const absl::Time now = options_.clock->Now();
    absl::MutexLock lock(&mutex_);
    std::vector<SessionName> expired;
    for (const auto& [owner, sessions] : sessions_) {
      for (const auto& [id, entry] : sessions) {
        if (static_cast<int64_t>(expired.size()) >= limit) break;
        if (entry.stored.expire_time <= now) expired.push_back({owner, id});
      }
    }
    for (const SessionName& name : expired) Erase(name);
    return static_cast<int64_t>(expired.size());
  }

  absl::Status Probe(int64_t) override { return absl::OkStatus(); }

  std::optional<int64_t> count() const override {
    absl::MutexLock lock(&mutex_);
    return count_;
  }

 private:
  struct Entry {
    StoredRecord stored;
    std::vector<std::pair<uint64_t, SharedBytes>> checkpoints;  // by revision; few
  };

  static int64_t BytesOf(const Entry& entry) {
    size_t bytes = sizeof(Entry) + entry.stored.record.size();
    for (const auto& [revision, checkpoint] : entry.checkpoints) bytes += checkpoint->size();
    return static_cast<int64_t>(bytes);
  }

  // Null when there is none or it has expired.
  Entry* Find(const SessionName& name, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto owner = sessions_.find(name.owner);
    if (owner == sessions_.end()) return nullptr;
    const auto session = owner->second.find(name.id);
    if (session == owner->second.end() || session->second.stored.expire_time <= now) {
      return nullptr;
    }
    return &session->second;
  }

  void Erase(const SessionName& name) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto owner = sessions_.find(name.owner);
    if (owner == sessions_.end()) return;
    const auto session = owner->second.find(name.id);
    if (session == owner->second.end()) return;
    bytes_ -= BytesOf(session->second);
    --count_;
    owner->second.erase(session);
    if (owner->second.empty()) sessions_.erase(owner);
  }

  const MemoryStoreOptions options_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, absl::flat_hash_map<std::string, Entry>> sessions_
      ABSL_GUARDED_BY(mutex_);  // by owner, by id
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

std::unique_ptr<SessionStore> MakeMemoryStore(const MemoryStoreOptions& options) {
  return std::make_unique<MemoryStore>(options);
}

}  // namespace mmfree
