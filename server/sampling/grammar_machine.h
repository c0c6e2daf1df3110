// Reads bytes by a grammar, keeping every way of understanding them.
#ifndef MMFREE_SERVER_SAMPLING_GRAMMAR_MACHINE_H_
#define MMFREE_SERVER_SAMPLING_GRAMMAR_MACHINE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "server/sampling/grammar.h"

namespace mmfree {

// A pushdown automaton made deterministic as it is used. A state is the set of stacks that the
// bytes so far may have led to; stacks share their lower parts, and states and their transitions
// are kept, so a byte is a table look-up the second time. A regular expression ends up as its
// finite automaton.
//
// Not thread-safe: Next fills the tables.
class GrammarMachine {
 public:
  using State = int32_t;
  static constexpr State kDead = 0;  // no sentence begins like this

  // `grammar` is finished.
  explicit GrammarMachine(const Grammar& grammar);

  State start() const { return start_; }
  State Next(State state, unsigned char byte);
  // Whether what was read is a sentence.
  bool accepting(State state) const { return states_[state].accepting; }

  // Bytes that the tables take, roughly, and stacks looked at to make them. Beyond the bounds Next
  // answers kDead to what it has not met before, and the machine is exhausted: how often is
  // counted.
  size_t bytes() const { return bytes_; }
  int64_t refusals() const { return refusals_; }
  static constexpr size_t kMaxBytes = size_t{64} << 20;
  static constexpr size_t kMaxWork = size_t{8} << 20;  // some tenths of a second

 private:
  // What is to be read: the symbols from `position` on, then what `rest` says. Stack 0 is empty:
  // the end of a sentence.
  using Stack = int32_t;
  struct StackNode {
    int32_t position;
    Stack rest;
  };

  struct StateEntry {
    std::vector<Stack> stacks;  // sorted; each has a byte set on top
    bool accepting = false;
  };

  Stack MakeStack(int32_t position, Stack rest);
  // The state of all that can be read when the stacks are as given, with rules opened up.
  State Close(std::vector<Stack> stacks);

  static constexpr int32_t kEnd = INT32_MAX;  // a sequence's end in symbols_

  std::vector<int32_t> symbols_;  // sequences, one after another
  std::vector<std::vector<int32_t>>
      rule_starts_;                    // by rule: where its alternatives are in symbols_
  std::array<uint8_t, 256> class_of_;  // bytes that no set tells apart are one class
  size_t num_classes_ = 0;
  std::vector<std::vector<char>> set_has_;  // [sets][classes]

  std::vector<StackNode> stacks_;
  absl::flat_hash_map<std::pair<int32_t, Stack>, Stack> stack_ids_;
  std::vector<StateEntry> states_;
  std::vector<State> transitions_;  // [states][classes]; kUnknown: not computed
  absl::flat_hash_map<std::pair<std::vector<Stack>, bool>, State> state_ids_;
  size_t bytes_ = 0;
  size_t work_ = 0;
  int64_t refusals_ = 0;
  State start_ = kDead;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_GRAMMAR_MACHINE_H_
