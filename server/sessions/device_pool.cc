#include "server/sessions/device_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {

absl::Status DevicePlace::Read(std::vector<float>* state) const {
  state->resize(static_cast<size_t>(pool_->options_.state_floats));
  const absl::Status read = pool_->options_.read(slot_, absl::MakeSpan(*state));
  if (read.ok()) return read;
  return absl::InternalError(
      absl::StrCat("the state could not be read from the device: ", read.message()));
}

DevicePool::DevicePool(Options options, SessionMetrics* metrics)
    : options_(std::move(options)), metrics_(metrics) {
  absl::MutexLock lock(&free_->mutex);
  for (int32_t i = options_.num_slots; i-- > 0;) {
    free_->slots.push_back(options_.first_slot + i);
  }
}

std::shared_ptr<const DevicePlace> DevicePool::Take() {
  {
    absl::MutexLock lock(&mutex_);
    if (closed_) return nullptr;
  }
  do {
    absl::MutexLock lock(&free_->mutex);
    if (free_->slots.empty()) continue;
    const int32_t slot = free_->slots.back();
    free_->slots.pop_back();
    return std::make_shared<const DevicePlace>(this, slot, [free = free_](int32_t released) {
      absl::MutexLock lock(&free->mutex);
      free->slots.push_back(released);
    });
  } while (EvictOne());
  return nullptr;
}

// The place of one that a running turn goes on from does not become free by this: it is freed when
// that turn has begun.
bool DevicePool::EvictOne() {
  Entries gone;
  {
    absl::MutexLock lock(&mutex_);
    if (entries_.empty()) return false;
    gone = Extract(std::prev(entries_.end()));
  }
  if (metrics_ != nullptr) metrics_->CountEvictions(SessionMetrics::Tier::kDevice, 1);
  return true;
}

void DevicePool::Put(uint64_t revision, SessionState context) {
  std::vector<float>().swap(context.state);
  auto kept = std::make_shared<const SessionState>(std::move(context));
  Erase(revision);
  absl::MutexLock lock(&mutex_);
  if (closed_ || by_revision_.contains(revision)) return;
  entries_.push_front({revision, std::move(kept)});
  by_revision_[revision] = entries_.begin();
  if (metrics_ != nullptr) metrics_->AddDeviceStates(1, state_bytes());
}

std::shared_ptr<const SessionState> DevicePool::Get(uint64_t revision) {
  absl::MutexLock lock(&mutex_);
  const auto found = by_revision_.find(revision);
  if (found == by_revision_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->context;
}

bool DevicePool::Contains(uint64_t revision) const {
  absl::MutexLock lock(&mutex_);
  return by_revision_.contains(revision);
}

void DevicePool::Erase(uint64_t revision) {
  Entries gone;
  absl::MutexLock lock(&mutex_);
  const auto found = by_revision_.find(revision);
  if (found != by_revision_.end()) gone = Extract(found->second);
}

void DevicePool::Close() {
  Entries gone;
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  while (!entries_.empty()) gone.splice(gone.end(), Extract(entries_.begin()));
}

DevicePool::Entries DevicePool::Extract(Entries::iterator entry) {
  Entries gone;
  by_revision_.erase(entry->revision);
  gone.splice(gone.end(), entries_, entry);
  if (metrics_ != nullptr) metrics_->AddDeviceStates(-1, -state_bytes());
  return gone;
}

}  // namespace mmfree
