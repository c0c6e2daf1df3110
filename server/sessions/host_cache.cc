#include "server/sessions/host_cache.h"

#include <utility>

namespace mmfree {

SharedBytes HostCache::Get(uint64_t revision) {
  absl::MutexLock lock(&mutex_);
  const auto found = by_revision_.find(revision);
  if (found == by_revision_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->bytes;
}

bool HostCache::Contains(uint64_t revision) const {
  absl::MutexLock lock(&mutex_);
  return by_revision_.contains(revision);
}

int64_t HostCache::Put(uint64_t revision, SharedBytes bytes) {
  absl::MutexLock lock(&mutex_);
  EraseLocked(revision);
  entries_.push_front({revision, std::move(bytes)});
  by_revision_[revision] = entries_.begin();
  bytes_ += Cost(entries_.front());
  int64_t evicted = 0;
  for (; bytes_ > max_bytes_; ++evicted) EraseLocked(entries_.back().revision);
  return evicted;
}

void HostCache::Erase(uint64_t revision) {
  absl::MutexLock lock(&mutex_);
  EraseLocked(revision);
}

int64_t HostCache::bytes() const {
  absl::MutexLock lock(&mutex_);
  return bytes_;
}

int64_t HostCache::states() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(entries_.size());
}

void HostCache::EraseLocked(uint64_t revision) {
  const auto found = by_revision_.find(revision);
  if (found == by_revision_.end()) return;
  bytes_ -= Cost(*found->second);
  entries_.erase(found->second);
  by_revision_.erase(found);
}

}  // namespace mmfree
