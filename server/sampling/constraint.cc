#include "server/sampling/constraint.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sampling/gbnf.h"
#include "server/sampling/json_schema.h"
#include "server/sampling/regex.h"

namespace mmfree {
namespace {

// Masks of one constraint: 4 KB each at 32,000 tokens.
constexpr size_t kMaxMasks = 4096;

absl::StatusOr<Grammar> Parse(ConstraintCache::Kind kind, absl::string_view text) {
  switch (kind) {
    case ConstraintCache::Kind::kRegex:
      return GrammarOfRegex(text);
    case ConstraintCache::Kind::kGrammar:
      return GrammarOfGbnf(text);
    case ConstraintCache::Kind::kJsonSchema:
      return GrammarOfJsonSchema(text);
  }
  return absl::InternalError("not a kind of constraint");
}

}  // namespace

CompiledConstraint::CompiledConstraint(const Grammar& grammar, Vocabulary vocabulary)
    : vocabulary_(std::move(vocabulary)), machine_(grammar) {
  absl::MutexLock lock(&mutex_);
  start_ = machine_.start();
  CountBytes();
}

TokenMask CompiledConstraint::Walk(State state, const TokenTrie& trie) {
  TokenMask mask(trie.vocab_size(), false);
  std::vector<State> states(static_cast<size_t>(trie.max_depth()) + 1);  // by depth
  states[0] = state;
  const std::vector<TokenTrie::Node>& nodes = trie.nodes();
  const auto end = static_cast<int32_t>(nodes.size());
  for (int32_t i = 0; i < end;) {
    const TokenTrie::Node& node = nodes[i];
    const State next = machine_.Next(states[node.depth - 1], node.byte);
    if (next == GrammarMachine::kDead) {
      i = node.skip;
      continue;
    }
    states[node.depth] = next;
    for (int32_t t = i == 0 ? 0 : nodes[i - 1].tokens_end; t < node.tokens_end; ++t) {
      mask.Add(trie.tokens()[t]);
    }
    ++i;
  }
  return mask;
}

std::shared_ptr<const TokenMask> CompiledConstraint::Mask(State state, bool first) {
  absl::MutexLock lock(&mutex_);
  const auto it = masks_.find({state, first});
  if (it != masks_.end()) return it->second;
  if (masks_.size() >= kMaxMasks) masks_.clear();
  const int64_t refusals = machine_.refusals();
  auto mask = std::make_shared<const TokenMask>(Walk(state, trie(first)));
  CountBytes();
  if (machine_.refusals() != refusals) return nullptr;
  masks_.emplace(std::make_pair(state, first), mask);
  return mask;
}

CompiledConstraint::State CompiledConstraint::Advance(State state, int32_t token, bool first) {
  absl::MutexLock lock(&mutex_);
  for (const char byte : trie(first).bytes(token)) {
    state = machine_.Next(state, static_cast<unsigned char>(byte));
  }
  return state;
}

void CompiledConstraint::CountBytes() {
  const auto mask_bytes = static_cast<size_t>(vocabulary_.running->vocab_size()) / 8;
  bytes_.store(machine_.bytes() + masks_.size() * mask_bytes, std::memory_order_relaxed);
}

bool CompiledConstraint::accepting(State state) const {
  absl::MutexLock lock(&mutex_);
  return machine_.accepting(state);
}

bool CompiledConstraint::large() const {
  absl::MutexLock lock(&mutex_);
  return machine_.refusals() > 0 || machine_.bytes() > GrammarMachine::kMaxBytes / 4;
}

std::shared_ptr<CompiledConstraint> ConstraintCache::Find(const std::string& key) {
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return nullptr;
  if (it->second->constraint->large()) {
    entries_.erase(it->second);
    by_key_.erase(it);
    return nullptr;
  }
  entries_.splice(entries_.begin(), entries_, it->second);
  return it->second->constraint;
}

absl::StatusOr<std::shared_ptr<CompiledConstraint>> ConstraintCache::Compile(
    Kind kind, absl::string_view text) {
  const std::string key = absl::StrCat(static_cast<int>(kind), ":", text);
  {
    absl::MutexLock lock(&mutex_);
    if (std::shared_ptr<CompiledConstraint> found = Find(key); found != nullptr) return found;
  }
  MMFREE_ASSIGN_OR_RETURN(const Grammar grammar, Parse(kind, text));
  absl::MutexLock lock(&mutex_);
  if (std::shared_ptr<CompiledConstraint> found = Find(key); found != nullptr) return found;
  if (vocabulary_.running == nullptr) vocabulary_ = make_vocabulary_();
  auto constraint = std::make_shared<CompiledConstraint>(grammar, vocabulary_);
  if (constraint->start() == GrammarMachine::kDead) {
    return absl::InvalidArgumentError("can begin in too many ways at once");
  }
  entries_.push_front({key, constraint});
  by_key_[key] = entries_.begin();
  size_t bytes = 0;
  for (const Entry& entry : entries_) bytes += entry.constraint->bytes();
  while (entries_.size() > 1 && (entries_.size() > kMaxEntries || bytes > max_bytes_)) {
    bytes -= std::min(bytes, entries_.back().constraint->bytes());  // it may have grown meanwhile
    by_key_.erase(entries_.back().key);
    entries_.pop_back();
  }
  return constraint;
}

}  // namespace mmfree
