// A tree of token sequences in which common prefixes are held once.
#ifndef MMFREE_SERVER_PREFIX_CACHE_RADIX_TREE_H_
#define MMFREE_SERVER_PREFIX_CACHE_RADIX_TREE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"

namespace mmfree {

// Each node stands for the sequence of the tokens on the way to it. Sequences are found by
// comparing all their tokens, so two different ones are never taken for each other. A node with a
// value that is not empty() keeps its address until it is pruned. Every operation takes time in
// proportion to the tokens it is given, or to those of a node that is split or merged. Not
// thread-safe.
template <typename Value>
class RadixTree {
 public:
  struct Node {
    Node* parent = nullptr;       // null for the root
    std::vector<int32_t> tokens;  // after the parent's; none for the root only
    int64_t length = 0;           // of the whole sequence
    absl::flat_hash_map<int32_t, std::unique_ptr<Node>> children;  // by their first token
    Value value{};
  };

  // Where a sequence leaves the tree.
  struct Match {
    Node* node = nullptr;   // the longest that is a prefix of the sequence
    Node* below = nullptr;  // a child of it that goes on as the sequence does, but not to its end
    int64_t length = 0;     // of the prefix that the sequence shares with `below`, or else `node`
  };

  RadixTree() = default;
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;
  ~RadixTree() {
    // Not by recursion: the nodes of one long prompt can hang one below the other.
    std::vector<std::unique_ptr<Node>> doomed;
    const auto take_children = [&doomed](Node* node) {
      for (auto& [token, child] : node->children) doomed.push_back(std::move(child));
      node->children.clear();
    };
    take_children(&root_);
    while (!doomed.empty()) {
      const std::unique_ptr<Node> node = std::move(doomed.back());
      doomed.pop_back();
      take_children(node.get());
    }
  }

  Match Find(absl::Span<const int32_t> tokens) { return FindFrom(&root_, tokens); }
  // Its nodes are not to be changed.
  Match Find(absl::Span<const int32_t> tokens) const {
    return FindFrom(const_cast<Node*>(&root_), tokens);
  }

  // The node of exactly this sequence, made if there is none. A new one that gets no value has to
  // be pruned.
  Node* Insert(absl::Span<const int32_t> tokens) {
    const Match match = Find(tokens);
    Node* const node = match.below == nullptr ? match.node : Split(match.below, match.length);
    if (match.length == static_cast<int64_t>(tokens.size())) return node;
    tokens.remove_prefix(static_cast<size_t>(match.length));
    auto leaf = std::make_unique<Node>();
    leaf->parent = node;
    leaf->tokens.assign(tokens.begin(), tokens.end());
    leaf->length = match.length + static_cast<int64_t>(tokens.size());
    Node* const made = leaf.get();
    Count(*made, 1);
    node->children.emplace(tokens.front(), std::move(leaf));
    return made;
  }

  // Takes out what no value is left to need: the node, if its value is empty, and what is above it.
  void Prune(Node* node) {
    while (node != &root_ && node->value.empty() && node->children.empty()) {
      Node* const parent = node->parent;
      Count(*node, -1);
      parent->children.erase(node->tokens.front());
      node = parent;
    }
    if (node != &root_ && node->value.empty() && node->children.size() == 1) Merge(node);
  }

  // No sequence is held.
  bool empty() const { return nodes_ == 0; }
  int64_t nodes() const { return nodes_; }  // without the root
  int64_t tokens() const { return tokens_; }

 private:
  static Match FindFrom(Node* node, absl::Span<const int32_t> tokens) {
    for (;;) {
      const absl::Span<const int32_t> rest = tokens.subspan(static_cast<size_t>(node->length));
      if (rest.empty()) return {node, nullptr, node->length};
      const auto found = node->children.find(rest.front());
      if (found == node->children.end()) return {node, nullptr, node->length};
      Node* const child = found->second.get();
      const size_t limit = std::min(rest.size(), child->tokens.size());
      const auto differs = std::mismatch(rest.begin(), rest.begin() + static_cast<ptrdiff_t>(limit),
                                         child->tokens.begin());
      const int64_t common = differs.first - rest.begin();
      if (common < static_cast<int64_t>(child->tokens.size())) {
        return {node, child, node->length + common};
      }
      node = child;
    }
  }

  // Puts a node at `length`, between `below` and its parent.
  Node* Split(Node* below, int64_t length) {
    Node* const parent = below->parent;
    std::unique_ptr<Node>& place = parent->children.find(below->tokens.front())->second;
    const auto cut = below->tokens.begin() + static_cast<ptrdiff_t>(length - parent->length);
    auto upper = std::make_unique<Node>();
    upper->parent = parent;
    upper->tokens.assign(below->tokens.begin(), cut);
    upper->length = length;
    below->tokens = std::vector<int32_t>(cut, below->tokens.end());
    below->parent = upper.get();
    Node* const made = upper.get();
    made->children.emplace(below->tokens.front(), std::move(place));
    place = std::move(upper);
    ++nodes_;  // the tokens are as many as before
    return made;
  }

  // Replaces the node by its only child.
  void Merge(Node* node) {
    std::unique_ptr<Node> child = std::move(node->children.begin()->second);
    std::vector<int32_t> tokens;
    tokens.reserve(node->tokens.size() + child->tokens.size());
    tokens.insert(tokens.end(), node->tokens.begin(), node->tokens.end());
    tokens.insert(tokens.end(), child->tokens.begin(), child->tokens.end());
    child->tokens = std::move(tokens);
    child->parent = node->parent;
    // Last: it destroys the node.
    node->parent->children.find(node->tokens.front())->second = std::move(child);
    --nodes_;
  }

  void Count(const Node& node, int64_t sign) {
    nodes_ += sign;
    tokens_ += sign * static_cast<int64_t>(node.tokens.size());
  }

  Node root_;
  int64_t nodes_ = 0;
  int64_t tokens_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_PREFIX_CACHE_RADIX_TREE_H_
