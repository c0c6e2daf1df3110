#include "server/sampling/stop_strings.h"

#include <utility>

namespace mmfree {

StopStrings::StopStrings(std::vector<std::string> strings)
    : strings_(std::move(strings)), nodes_(1) {
  // A node's path, to link the nodes in the order of their depth.
  struct Child {
    Node parent;
    char byte;
    Node node;
  };
  std::vector<Child> children;
  for (size_t i = 0; i < strings_.size(); ++i) {
    Node node = kStart;
    for (const char byte : strings_[i]) {
      const auto [edge, added] =
          edges_.try_emplace(EdgeKey(node, byte), static_cast<Node>(nodes_.size()));
      if (added) {
        nodes_.push_back({kStart, nodes_[node].depth + 1, -1});
        children.push_back({node, byte, edge->second});
      }
      node = edge->second;
    }
    if (nodes_[node].match < 0) nodes_[node].match = static_cast<int32_t>(i);
  }
  std::vector<std::vector<Child>> by_depth;
  for (const Child& child : children) {
    const size_t depth = nodes_[child.node].depth;
    if (by_depth.size() <= depth) by_depth.resize(depth + 1);
    by_depth[depth].push_back(child);
  }
  for (const std::vector<Child>& level : by_depth) {
    for (const Child& child : level) {
      State& state = nodes_[child.node];
      if (child.parent != kStart) state.fail = Next(nodes_[child.parent].fail, child.byte);
      if (state.match < 0) state.match = nodes_[state.fail].match;
    }
  }
}

StopStrings::Node StopStrings::Next(Node node, char byte) const {
  for (;;) {
    const auto edge = edges_.find(EdgeKey(node, byte));
    if (edge != edges_.end()) return edge->second;
    if (node == kStart) return kStart;
    node = nodes_[node].fail;
  }
}

}  // namespace mmfree
