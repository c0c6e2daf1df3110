#include "server/sampling/gbnf.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sampling/quantifier.h"
#include "server/sampling/text_reader.h"

namespace mmfree {
namespace {

constexpr int kMaxDepth = 200;

bool IsNameCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_';
}

class GbnfParser {
 public:
  explicit GbnfParser(absl::string_view text) : in_(text) {}

  absl::StatusOr<Grammar> Parse() {
    SkipSpace();
    while (!in_.done()) {
      MMFREE_RETURN_IF_ERROR(ParseRule());
    }
    for (const auto& [name, rule] : rules_) {
      if (!defined_[rule]) {
        return absl::InvalidArgumentError(absl::StrCat("the rule \"", name, "\" is not defined"));
      }
    }
    const auto root = rules_.find("root");
    if (root == rules_.end()) return absl::InvalidArgumentError("has no rule \"root\"");
    MMFREE_RETURN_IF_ERROR(grammar_.Finish(root->second));
    return std::move(grammar_);
  }

 private:
  void SkipSpace() {
    while (!in_.done()) {
      if (in_.Peek() == '#') {
        while (!in_.done() && in_.Peek() != '\n') in_.TakeCharacter();
      } else if (absl::ascii_isspace(static_cast<unsigned char>(in_.Peek()))) {
        in_.TakeCharacter();
      } else {
        return;
      }
    }
  }

  std::string TakeName() {
    std::string name;
    while (IsNameCharacter(in_.Peek())) {
      name.push_back(in_.Peek());
      in_.TakeCharacter();
    }
    return name;
  }

  // Whether a rule's definition begins here: a sequence ends before it.
  bool AtDefinition() {
    const size_t start = in_.at();
    const bool named = !TakeName().empty();
    SkipSpace();
    const bool defined = in_.Consume("::=");
    in_.Rewind(start);
    return named && defined;
  }

  Grammar::Rule RuleOf(const std::string& name) {
    const auto [it, added] = rules_.try_emplace(name, -1);
    if (added) {
      it->second = grammar_.AddRule();
      defined_[it->second] = false;
    }
    return it->second;
  }

  absl::Status ParseRule() {
    const std::string name = TakeName();
    if (name.empty()) return in_.Error("expected the name of a rule");
    SkipSpace();
    if (!in_.Consume("::=")) return in_.Error(absl::StrCat("expected ::= after \"", name, "\""));
    const Grammar::Rule rule = RuleOf(name);
    if (std::exchange(defined_[rule], true)) {
      return in_.Error(absl::StrCat("the rule \"", name, "\" is defined twice"));
    }
    SkipSpace();
    MMFREE_ASSIGN_OR_RETURN(std::vector<Grammar::Sequence> alternatives, Alternatives(0));
    for (Grammar::Sequence& sequence : alternatives) {
      grammar_.AddAlternative(rule, std::move(sequence));
    }
    if (!in_.done() && !AtDefinition()) return in_.Error("expected a rule");
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<Grammar::Sequence>> Alternatives(int depth) {
    if (depth > kMaxDepth) return in_.Error("groups are nested too deeply");
    std::vector<Grammar::Sequence> alternatives;
    do {
      SkipSpace();
      Grammar::Sequence sequence;
      while (!in_.done() && in_.Peek() != '|' && in_.Peek() != ')' && !AtDefinition()) {
        MMFREE_ASSIGN_OR_RETURN(const Grammar::Sequence item, Repeated(depth));
        sequence.insert(sequence.end(), item.begin(), item.end());
      }
      alternatives.push_back(std::move(sequence));
    } while (in_.Consume("|"));
    return alternatives;
  }

  absl::StatusOr<Grammar::Sequence> Repeated(int depth) {
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence item, Atom(depth));
    for (;;) {
      SkipSpace();
      MMFREE_ASSIGN_OR_RETURN(const std::optional<Quantifier> count, TakeQuantifier(&in_));
      if (!count.has_value()) return item;
      item = grammar_.Repeat(item, count->min, count->max);
    }
  }

  absl::StatusOr<Grammar::Sequence> Atom(int depth) {
    if (in_.Consume("(")) {
      MMFREE_ASSIGN_OR_RETURN(std::vector<Grammar::Sequence> alternatives, Alternatives(depth + 1));
      if (!in_.Consume(")")) return in_.Error("a ( without its )");
      return grammar_.OneOf(std::move(alternatives));
    }
    if (in_.Consume("\"")) return Literal();
    if (in_.Consume("[")) return Class();
    if (in_.Consume(".")) return grammar_.Character({{0, kLastCodePoint}});
    const std::string name = TakeName();
    if (name.empty()) return in_.Error("expected a name, \"text\", [characters], ( or .");
    return Grammar::Sequence{RuleOf(name)};
  }

  absl::StatusOr<Grammar::Sequence> Literal() {
    Grammar::Sequence sequence;
    while (!in_.Consume("\"")) {
      if (in_.done()) return in_.Error("a \" without its end");
      MMFREE_ASSIGN_OR_RETURN(const uint32_t point, Character());
      const Grammar::Sequence character = grammar_.Character({{point, point}});
      sequence.insert(sequence.end(), character.begin(), character.end());
    }
    return sequence;
  }

  absl::StatusOr<Grammar::Sequence> Class() {
    const bool negated = in_.Consume("^");
    CodePoints points;
    while (!in_.Consume("]")) {
      if (in_.done()) return in_.Error("a [ without its ]");
      MMFREE_ASSIGN_OR_RETURN(const uint32_t low, Character());
      uint32_t high = low;
      const size_t before = in_.at();
      if (in_.Consume("-")) {
        if (in_.Peek() == ']' || in_.done()) {
          in_.Rewind(before);
        } else {
          MMFREE_ASSIGN_OR_RETURN(high, Character());
          if (high < low) return in_.Error("a range of characters has no order");
        }
      }
      points.emplace_back(low, high);
    }
    return grammar_.Character(negated ? Complement(points) : points);
  }

  absl::StatusOr<uint32_t> Character() {
    if (!in_.Consume("\\")) return in_.TakeCharacter();
    if (in_.done()) return in_.Error("a \\ at the end");
    const uint32_t c = in_.TakeCharacter();
    switch (c) {
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case 'x':
        return in_.TakeHex(2);
      case 'u':
        return in_.TakeHex(4);
      case 'U': {
        MMFREE_ASSIGN_OR_RETURN(const uint32_t point, in_.TakeHex(8));
        if (point > kLastCodePoint) return in_.Error("not a code point");
        return point;
      }
      case '"':
      case '\\':
      case '[':
      case ']':
      case '-':
      case '^':
        return c;
      default:
        return in_.Error("an unknown \\ escape");
    }
  }

  TextReader in_;
  Grammar grammar_;
  absl::flat_hash_map<std::string, Grammar::Rule> rules_;
  absl::flat_hash_map<Grammar::Rule, bool> defined_;
};

}  // namespace

absl::StatusOr<Grammar> GrammarOfGbnf(absl::string_view text) { return GbnfParser(text).Parse(); }

}  // namespace mmfree
