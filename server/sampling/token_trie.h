// The vocabulary as a tree of bytes.
#ifndef MMFREE_SERVER_SAMPLING_TOKEN_TRIE_H_
#define MMFREE_SERVER_SAMPLING_TOKEN_TRIE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace mmfree {

// Immutable, so thread-safe. The nodes are in the order of a walk that visits parents first, so
// that leaving out a subtree is one jump.
class TokenTrie {
 public:
  struct Node {
    unsigned char byte = 0;
    int32_t depth = 0;       // bytes from the root to this one: 1 for the first
    int32_t skip = 0;        // the node after this one's subtree
    int32_t tokens_end = 0;  // tokens() of this node end here, and begin where the last one's end
  };

  // By id; tokens without bytes are not in it.
  explicit TokenTrie(std::vector<std::string> token_bytes);

  int64_t vocab_size() const { return static_cast<int64_t>(token_bytes_.size()); }
  absl::string_view bytes(int32_t id) const { return token_bytes_[static_cast<size_t>(id)]; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  int32_t max_depth() const { return max_depth_; }

 private:
  const std::vector<std::string> token_bytes_;
  std::vector<Node> nodes_;
  std::vector<int32_t> tokens_;
  int32_t max_depth_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_TOKEN_TRIE_H_
