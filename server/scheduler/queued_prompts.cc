#include "server/scheduler/queued_prompts.h"

#include "absl/hash/hash.h"

namespace mmfree {

QueuedPrompts::Key QueuedPrompts::KeyOf(const Prompt& prompt) {
  return {std::string(prompt.space), prompt.cached,
          absl::HashOf(prompt.tokens.first(static_cast<size_t>(prompt.cached)))};
}

absl::Span<const int32_t> QueuedPrompts::Shareable(const Prompt& prompt) {
  if (prompt.space.empty()) return {};
  const size_t cached = static_cast<size_t>(prompt.cached);
  return prompt.tokens.subspan(cached, prompt.tokens.size() - cached - 1);
}

int64_t QueuedPrompts::Added(const Prompt& prompt) const {
  const int64_t all = static_cast<int64_t>(prompt.tokens.size()) - prompt.cached;
  const absl::Span<const int32_t> shareable = Shareable(prompt);
  if (shareable.empty()) return all;
  const auto found = trees_.find(KeyOf(prompt));
  if (found == trees_.end()) return all;
  const Tree& tree = *found->second;
  return all - tree.Find(shareable).length;
}

void QueuedPrompts::Add(const Prompt& prompt) {
  const absl::Span<const int32_t> shareable = Shareable(prompt);
  if (shareable.empty()) return;
  std::unique_ptr<Tree>& tree = trees_[KeyOf(prompt)];
  if (tree == nullptr) tree = std::make_unique<Tree>();
  ++tree->Insert(shareable)->value.count;
}

int64_t QueuedPrompts::Remove(const Prompt& prompt) {
  const int64_t all = static_cast<int64_t>(prompt.tokens.size()) - prompt.cached;
  const absl::Span<const int32_t> shareable = Shareable(prompt);
  if (shareable.empty()) return all;
  const auto found = trees_.find(KeyOf(prompt));
  Tree& tree = *found->second;
  const int64_t before = tree.tokens();
  Tree::Node* const node = tree.Find(shareable).node;
  --node->value.count;
  tree.Prune(node);
  const int64_t fewer = before - tree.tokens();
  if (tree.empty()) trees_.erase(found);
  return all - static_cast<int64_t>(shareable.size()) + fewer;
}

}  // namespace mmfree
