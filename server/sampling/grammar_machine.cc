#include "server/sampling/grammar_machine.h"

#include <algorithm>
#include <string>

namespace mmfree {
namespace {

constexpr int32_t kUnknown = -1;
constexpr int32_t kEmptyStack = 0;
// Ways to understand a text at once; more come from grammars that are ambiguous beyond use.
constexpr size_t kMaxStacks = 10'000;

}  // namespace

GrammarMachine::GrammarMachine(const Grammar& grammar) {
  for (const std::vector<Grammar::Sequence>& alternatives : grammar.rules()) {
    std::vector<int32_t>& starts = rule_starts_.emplace_back();
    for (const Grammar::Sequence& sequence : alternatives) {
      starts.push_back(static_cast<int32_t>(symbols_.size()));
      symbols_.insert(symbols_.end(), sequence.begin(), sequence.end());
      symbols_.push_back(kEnd);
    }
  }
  // Bytes with the same membership in every set.
  absl::flat_hash_map<std::string, uint8_t> classes;
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string membership;
    for (const ByteSet& set : grammar.sets()) membership.push_back(set[byte] ? '1' : '0');
    class_of_[byte] =
        classes.try_emplace(membership, static_cast<uint8_t>(classes.size())).first->second;
  }
  num_classes_ = classes.size();
  for (const ByteSet& set : grammar.sets()) {
    std::vector<char>& has = set_has_.emplace_back(num_classes_, 0);
    for (size_t byte = 0; byte < 256; ++byte) {
      if (set[byte]) has[class_of_[byte]] = 1;
    }
  }
  stacks_.push_back({kEnd, kEmptyStack});
  states_.emplace_back();  // kDead
  transitions_.assign(num_classes_, kDead);
  std::vector<Stack> first;
  for (const int32_t position : rule_starts_[grammar.root()]) {
    first.push_back(MakeStack(position, kEmptyStack));
  }
  start_ = Close(std::move(first));
}

GrammarMachine::Stack GrammarMachine::MakeStack(int32_t position, Stack rest) {
  if (symbols_[position] == kEnd) return rest;
  const auto [it, added] =
      stack_ids_.try_emplace({position, rest}, static_cast<Stack>(stacks_.size()));
  if (added) {
    stacks_.push_back({position, rest});
    bytes_ += 4 * sizeof(StackNode);  // with its share of the table
  }
  return it->second;
}

GrammarMachine::State GrammarMachine::Close(std::vector<Stack> stacks) {
  bool accepting = false;
  std::vector<Stack> closed;
  absl::flat_hash_map<Stack, bool> seen;
  while (!stacks.empty()) {
    const Stack stack = stacks.back();
    stacks.pop_back();
    if (!seen.try_emplace(stack, true).second) continue;
    ++work_;
    if (seen.size() > kMaxStacks) {
      ++refusals_;
      return kDead;
    }
    if (stack == kEmptyStack) {
      accepting = true;
      continue;
    }
    const StackNode node = stacks_[stack];
    const int32_t symbol = symbols_[node.position];
    if (symbol < 0) {
      closed.push_back(stack);
      continue;
    }
    const Stack rest = MakeStack(node.position + 1, node.rest);
    for (const int32_t start : rule_starts_[symbol]) stacks.push_back(MakeStack(start, rest));
  }
  if (closed.empty() && !accepting) return kDead;
  std::sort(closed.begin(), closed.end());
  const auto [it, added] =
      state_ids_.try_emplace({closed, accepting}, static_cast<State>(states_.size()));
  if (added) {
    bytes_ +=
        2 * closed.size() * sizeof(Stack) + num_classes_ * sizeof(State) + 2 * sizeof(StateEntry);
    states_.push_back({std::move(closed), accepting});
    transitions_.resize(states_.size() * num_classes_, kUnknown);
  }
  return it->second;
}

GrammarMachine::State GrammarMachine::Next(State state, unsigned char byte) {
  const size_t byte_class = class_of_[byte];
  const size_t index = static_cast<size_t>(state) * num_classes_ + byte_class;
  if (transitions_[index] != kUnknown) return transitions_[index];
  if (bytes_ > kMaxBytes || work_ > kMaxWork) {
    ++refusals_;
    return kDead;
  }
  std::vector<Stack> stacks;
  for (const Stack stack : states_[state].stacks) {
    const StackNode node = stacks_[stack];
    if (set_has_[~symbols_[node.position]][byte_class] == 0) continue;
    stacks.push_back(MakeStack(node.position + 1, node.rest));
  }
  const int64_t refusals = refusals_;
  const State next = Close(std::move(stacks));
  if (refusals_ == refusals) transitions_[index] = next;
  return next;
}

}  // namespace mmfree
