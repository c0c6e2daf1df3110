// Finds the first of many strings in a stream of bytes.
#ifndef MMFREE_SERVER_SAMPLING_STOP_STRINGS_H_
#define MMFREE_SERVER_SAMPLING_STOP_STRINGS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace mmfree {

// An Aho-Corasick automaton: each byte takes constant time on average, however many strings there
// are. Immutable, so thread-safe; one is shared by the streams of a request.
class StopStrings {
 public:
  // What was read so far; kStart: nothing.
  using Node = int32_t;
  static constexpr Node kStart = 0;

  // At least one string, none empty.
  explicit StopStrings(std::vector<std::string> strings);

  Node Next(Node node, char byte) const;

  // Bytes at the end of what was read that a string may begin with: the longest such.
  size_t pending(Node node) const { return nodes_[node].depth; }

  // The string that what was read ends with, as an index: the longest, of equal ones the first; -1
  // when there is none.
  int32_t match(Node node) const { return nodes_[node].match; }

  const std::string& string(int32_t index) const { return strings_[index]; }

 private:
  struct State {
    Node fail = kStart;  // the node of the longest proper suffix
    uint32_t depth = 0;
    int32_t match = -1;
  };

  static uint64_t EdgeKey(Node node, char byte) {
    return (static_cast<uint64_t>(node) << 8) | static_cast<unsigned char>(byte);
  }

  const std::vector<std::string> strings_;
  std::vector<State> nodes_;
  absl::flat_hash_map<uint64_t, Node> edges_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_STOP_STRINGS_H_
