// States after the beginnings of prompts, for the prompts that begin alike.
#ifndef MMFREE_SERVER_PREFIX_CACHE_PREFIX_CACHE_H_
#define MMFREE_SERVER_PREFIX_CACHE_PREFIX_CACHE_H_

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/metrics/prefix_cache_metrics.h"
#include "server/prefix_cache/radix_tree.h"

namespace mmfree {

// A state in host memory, [state_floats]. Shared with whoever is about to use it, so that it may
// leave the cache meanwhile.
using SharedState = std::shared_ptr<const std::vector<float>>;

// Checkpoints by the tokens that led to them, within a space: a space is one model and those who
// may know of each other's prompts (PrefixSpace). Found by comparing tokens, never by a hash of
// them. The least recently used leave when the whole is above its budget, which counts the states,
// the tokens, the nodes of the tree and the names of the spaces.
//
// Thread-safe; one lock, held for a walk over the tokens of one prompt. States are copied and freed
// outside it.
class PrefixCache {
 public:
  // `metrics` may be null; otherwise it must outlive the cache.
  PrefixCache(int64_t max_bytes, PrefixCacheMetrics* metrics);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  struct Hit {
    SharedState state;   // after the first `tokens` tokens; null when that is none
    int64_t tokens = 0;  // of the longest prefix whose state is here
    // Of the longest prefix that some other prompt's checkpoint also starts with; at least
    // `tokens`.
    int64_t common = 0;
  };
  // What is known of a beginning of `tokens`. The checkpoint found counts as used.
  Hit Find(absl::string_view space, absl::Span<const int32_t> tokens);
  // Hit::tokens, without a trace.
  int64_t Peek(absl::string_view space, absl::Span<const int32_t> tokens) const;

  // Keeps the state after exactly `tokens`, at least one, as the most recently used. What is there
  // already stays, as it is the same. A checkpoint larger than the budget is not kept.
  void Insert(absl::string_view space, absl::Span<const int32_t> tokens, SharedState state);

  int64_t bytes() const;
  int64_t checkpoints() const;

 private:
  struct Use;
  struct Checkpoint {
    SharedState state;
    std::list<Use>::iterator use;  // while there is a state
    bool empty() const { return state == nullptr; }
  };
  using Tree = RadixTree<Checkpoint>;
  struct Space {
    std::string name;
    Tree tree;
  };
  struct Use {
    Space* space;
    Tree::Node* node;
  };

  static int64_t Bytes(const Space& space);
  static int64_t Bytes(const SharedState& state);
  // The longest prefix with a state; null for none.
  static Tree::Node* Deepest(const Tree::Match& match);
  // Takes the least recently used out and appends its state to `freed`.
  void Evict(std::vector<SharedState>* freed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Report() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int64_t max_bytes_;
  PrefixCacheMetrics* const metrics_;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, std::unique_ptr<Space>> spaces_ ABSL_GUARDED_BY(mutex_);
  std::list<Use> uses_ ABSL_GUARDED_BY(mutex_);  // most recent first
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

// The name of the space of a model, by its digest, and of a caller's prompts with a salt. Different
// for any two different triples.
std::string PrefixSpace(absl::string_view digest, absl::string_view caller, absl::string_view salt);

}  // namespace mmfree

#endif  // MMFREE_SERVER_PREFIX_CACHE_PREFIX_CACHE_H_
