// Forces an output to be a sentence of a grammar, token by token.
#ifndef MMFREE_SERVER_SAMPLING_CONSTRAINT_H_
#define MMFREE_SERVER_SAMPLING_CONSTRAINT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/sampling/grammar_machine.h"
#include "server/sampling/token_mask.h"
#include "server/sampling/token_trie.h"

namespace mmfree {

// The bytes that each token adds to a text.
struct Vocabulary {
  std::shared_ptr<const TokenTrie> running;  // within a text
  std::shared_ptr<const TokenTrie> first;    // as the first token of all: without its dummy space
};

// A grammar over a vocabulary, with the masks made so far. Thread-safe; shared by the requests that
// ask for the same constraint.
class CompiledConstraint {
 public:
  using State = GrammarMachine::State;

  CompiledConstraint(const Grammar& grammar, Vocabulary vocabulary);

  State start() const { return start_; }
  // Tokens after which what was read still begins a sentence. `first`: it is the first of all text.
  // The first call for a state walks the vocabulary (up to milliseconds); later ones look it up.
  // Null when the machine's bounds do not let it be known: what can follow never depends on which
  // requests used the constraint before.
  std::shared_ptr<const TokenMask> Mask(State state, bool first);
  State Advance(State state, int32_t token, bool first);
  bool accepting(State state) const;

  // Whether it has grown so much that new requests should rather begin with an empty one.
  bool large() const;
  // Bytes that it takes, roughly, as of the last new mask. Never waits.
  size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  const TokenTrie& trie(bool first) const {
    return first ? *vocabulary_.first : *vocabulary_.running;
  }
  TokenMask Walk(State state, const TokenTrie& trie) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountBytes() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Vocabulary vocabulary_;
  State start_;
  mutable absl::Mutex mutex_;
  GrammarMachine machine_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::pair<State, bool>, std::shared_ptr<const TokenMask>> masks_
      ABSL_GUARDED_BY(mutex_);
  std::atomic<size_t> bytes_{0};
};

// Where one output is in its constraint. A copy goes on by itself. Not thread-safe.
class ConstraintCursor {
 public:
  // `starts_text`: the output's first token is the first of all text.
  ConstraintCursor(std::shared_ptr<CompiledConstraint> constraint, bool starts_text)
      : constraint_(std::move(constraint)), state_(constraint_->start()), first_(starts_text) {}

  // Null: as CompiledConstraint::Mask.
  std::shared_ptr<const TokenMask> Mask() const { return constraint_->Mask(state_, first_); }
  // Whether what was appended does not begin a sentence.
  bool dead() const { return state_ == GrammarMachine::kDead; }
  // Whether the output may end here.
  bool complete() const { return constraint_->accepting(state_); }
  void Append(int32_t token) {
    state_ = constraint_->Advance(state_, token, first_);
    first_ = false;
  }

 private:
  std::shared_ptr<CompiledConstraint> constraint_;
  CompiledConstraint::State state_;
  bool first_;
};

// Compiles constraints and keeps those used last. Thread-safe.
class ConstraintCache {
 public:
  enum class Kind : uint8_t { kRegex, kGrammar, kJsonSchema };
  static constexpr size_t kMaxEntries = 64;
  static constexpr size_t kMaxBytes = size_t{256} << 20;

  // `vocabulary` is called once, with the first constraint. `max_bytes`: of what is kept for later
  // requests, when one is added.
  explicit ConstraintCache(std::function<Vocabulary()> vocabulary, size_t max_bytes = kMaxBytes)
      : make_vocabulary_(std::move(vocabulary)), max_bytes_(max_bytes) {}

  // INVALID_ARGUMENT: not a text of that kind, or nothing can match it. UNIMPLEMENTED: a part of it
  // that is not supported. Both say which part.
  absl::StatusOr<std::shared_ptr<CompiledConstraint>> Compile(Kind kind, absl::string_view text);

 private:
  struct Entry {
    std::string key;
    std::shared_ptr<CompiledConstraint> constraint;
  };

  std::shared_ptr<CompiledConstraint> Find(const std::string& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::function<Vocabulary()> make_vocabulary_;
  const size_t max_bytes_;
  absl::Mutex mutex_;
  Vocabulary vocabulary_ ABSL_GUARDED_BY(mutex_);
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // used last first
  absl::flat_hash_map<std::string, std::list<Entry>::iterator> by_key_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_CONSTRAINT_H_
