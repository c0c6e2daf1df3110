#include "server/prefix_cache/prefix_cache.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

// What the allocator and the hash table of the parent add to a node; of a state and its entry in
// the list of uses; and of a space.
constexpr int64_t kNodeOverhead = 64;
constexpr int64_t kStateOverhead = 112;
constexpr int64_t kSpaceOverhead = 128;

}  // namespace

PrefixCache::PrefixCache(int64_t max_bytes, PrefixCacheMetrics* metrics)
    : max_bytes_(max_bytes), metrics_(metrics) {}

PrefixCache::~PrefixCache() = default;

int64_t PrefixCache::Bytes(const Space& space) {
  return kSpaceOverhead + static_cast<int64_t>(sizeof(Space) + 2 * space.name.size()) +
         space.tree.nodes() * (static_cast<int64_t>(sizeof(Tree::Node)) + kNodeOverhead) +
         space.tree.tokens() * static_cast<int64_t>(sizeof(int32_t));
}

int64_t PrefixCache::Bytes(const SharedState& state) {
  return static_cast<int64_t>(state->size() * sizeof(float)) + kStateOverhead;
}

PrefixCache::Tree::Node* PrefixCache::Deepest(const Tree::Match& match) {
  Tree::Node* node = match.node;
  while (node != nullptr && node->value.empty()) node = node->parent;
  return node;
}

PrefixCache::Hit PrefixCache::Find(absl::string_view space, absl::Span<const int32_t> tokens) {
  Hit hit;
  absl::MutexLock lock(&mutex_);
  const auto found = spaces_.find(space);
  if (found == spaces_.end()) return hit;
  const Tree::Match match = found->second->tree.Find(tokens);
  hit.common = match.length;
  if (const Tree::Node* const node = Deepest(match); node != nullptr) {
    hit.state = node->value.state;
    hit.tokens = node->length;
    uses_.splice(uses_.begin(), uses_, node->value.use);
  }
  return hit;
}

int64_t PrefixCache::Peek(absl::string_view space, absl::Span<const int32_t> tokens) const {
  absl::MutexLock lock(&mutex_);
  const auto found = spaces_.find(space);
  if (found == spaces_.end()) return 0;
  const Tree::Node* const node = Deepest(std::as_const(found->second->tree).Find(tokens));
  return node == nullptr ? 0 : node->length;
}

void PrefixCache::Insert(absl::string_view space, absl::Span<const int32_t> tokens,
                         SharedState state) {
  if (Bytes(state) + static_cast<int64_t>(tokens.size() * sizeof(int32_t)) > max_bytes_) return;
  std::vector<SharedState> freed;  // after the lock
  absl::MutexLock lock(&mutex_);
  std::unique_ptr<Space>& place = spaces_[space];
  if (place == nullptr) {
    place = std::make_unique<Space>();
    place->name = std::string(space);
    bytes_ += Bytes(*place);
  }
  const int64_t before = Bytes(*place);
  Tree::Node* const node = place->tree.Insert(tokens);
  bytes_ += Bytes(*place) - before;
  if (node->value.empty()) {
    bytes_ += Bytes(state);
    node->value.state = std::move(state);
    uses_.push_front(Use{place.get(), node});
    node->value.use = uses_.begin();
  } else {
    uses_.splice(uses_.begin(), uses_, node->value.use);
  }
  int64_t evictions = 0;
  while (bytes_ > max_bytes_) {
    Evict(&freed);
    ++evictions;
  }
  if (metrics_ != nullptr && evictions > 0) metrics_->CountEvictions(evictions);
  Report();
}

void PrefixCache::Evict(std::vector<SharedState>* freed) {
  const Use use = uses_.back();
  uses_.pop_back();
  bytes_ -= Bytes(use.node->value.state) + Bytes(*use.space);
  freed->push_back(std::move(use.node->value.state));
  use.space->tree.Prune(use.node);
  if (use.space->tree.empty()) {
    spaces_.erase(spaces_.find(use.space->name));
  } else {
    bytes_ += Bytes(*use.space);
  }
}

void PrefixCache::Report() {
  if (metrics_ == nullptr) return;
  metrics_->SetBytes(bytes_);
  metrics_->SetCheckpoints(static_cast<int64_t>(uses_.size()));
}

int64_t PrefixCache::bytes() const {
  absl::MutexLock lock(&mutex_);
  return bytes_;
}

int64_t PrefixCache::checkpoints() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(uses_.size());
}

std::string PrefixSpace(absl::string_view digest, absl::string_view caller,
                        absl::string_view salt) {
  return absl::StrCat(digest.size(), ":", digest, caller.size(), ":", caller, salt);
}

}  // namespace mmfree
