// Context-free grammars over bytes: what regular expressions, GBNF and JSON schemas are compiled
// to.
#ifndef MMFREE_SERVER_SAMPLING_GRAMMAR_H_
#define MMFREE_SERVER_SAMPLING_GRAMMAR_H_

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace mmfree {

using ByteSet = std::bitset<256>;

// Unicode code points as ranges, ends included. Surrogates are never meant.
using CodePoints = std::vector<std::pair<uint32_t, uint32_t>>;

inline constexpr uint32_t kLastCodePoint = 0x10ffff;

// Sorted, without overlaps.
CodePoints Normalized(CodePoints points);
CodePoints Complement(const CodePoints& points);
CodePoints Intersection(const CodePoints& a, const CodePoints& b);

// Built up rule by rule, then checked once. Text is UTF-8. Not thread-safe while it is built.
class Grammar {
 public:
  using Rule = int32_t;

  // A rule (not negative), or one byte of a set: ~index.
  using Symbol = int32_t;
  using Sequence = std::vector<Symbol>;

  // Symbols a grammar may have: bounds what a request can make the server keep.
  static constexpr size_t kMaxSymbols = 200'000;

  Rule AddRule() {
    rules_.emplace_back();
    return static_cast<Rule>(rules_.size()) - 1;
  }
  void AddAlternative(Rule rule, Sequence sequence);

  // What follows adds rules where it needs them; each gives a sequence to use in an alternative.
  Sequence Bytes(absl::string_view literal);
  // One character. With none in the set: nothing matches.
  Sequence Character(const CodePoints& points);
  // `item`, min to max times; max < 0: without bound.
  Sequence Repeat(const Sequence& item, int64_t min, int64_t max);
  Sequence Optional(const Sequence& item) { return Repeat(item, 0, 1); }
  Sequence OneOf(std::vector<Sequence> alternatives);

  // Ends the building: the sentences are those of `root`. Drops what can never end in a sentence.
  // INVALID_ARGUMENT: nothing matches, or a rule begins with itself, or it is too large.
  absl::Status Finish(Rule root);

  Rule root() const { return root_; }
  const std::vector<std::vector<Sequence>>& rules() const { return rules_; }
  const std::vector<ByteSet>& sets() const { return sets_; }
  bool too_large() const { return symbols_ > kMaxSymbols; }

 private:
  Symbol Set(const ByteSet& bytes);
  void DropUnproductive();
  bool LeftRecursive() const;

  std::vector<std::vector<Sequence>> rules_;  // alternatives of each
  std::vector<ByteSet> sets_;
  size_t symbols_ = 0;
  Rule root_ = -1;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_GRAMMAR_H_
