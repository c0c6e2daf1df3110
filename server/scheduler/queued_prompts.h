// How many tokens the prompts that wait have together, when what they have in common is fed once.
#ifndef MMFREE_SERVER_SCHEDULER_QUEUED_PROMPTS_H_
#define MMFREE_SERVER_SCHEDULER_QUEUED_PROMPTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/prefix_cache/radix_tree.h"

namespace mmfree {

// A set of prompts. Those of one space that start from the same cached state, or from none, count
// each token of their common beginnings once, whatever order they come and go in; but each its last
// token, which is always fed. Keeps a copy of their tokens. Every operation takes time in
// proportion to those of its prompt. Not thread-safe.
class QueuedPrompts {
 public:
  struct Prompt {
    absl::string_view space;  // as PrefixSharing::SpaceOf; empty: shares nothing
    absl::Span<const int32_t> tokens;
    int64_t cached = 0;  // of the tokens, those that need not be fed; less than all
  };

  // Tokens that the prompt would add.
  int64_t Added(const Prompt& prompt) const;
  void Add(const Prompt& prompt);
  // Takes out one that was added, and gives the tokens that are fewer now.
  int64_t Remove(const Prompt& prompt);

  bool empty() const { return trees_.empty(); }

 private:
  struct Holders {
    int64_t count = 0;
    bool empty() const { return count == 0; }
  };
  using Tree = RadixTree<Holders>;
  using Key = std::tuple<std::string, int64_t, uint64_t>;  // space, and the state to start from

  static Key KeyOf(const Prompt& prompt);
  // Its tokens that others may have, too.
  static absl::Span<const int32_t> Shareable(const Prompt& prompt);

  absl::flat_hash_map<Key, std::unique_ptr<Tree>> trees_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_QUEUED_PROMPTS_H_
