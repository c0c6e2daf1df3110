#include "server/sampling/regex.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sampling/quantifier.h"
#include "server/sampling/text_reader.h"

namespace mmfree {
namespace {

constexpr int kMaxDepth = 200;

const CodePoints& Digits() {
  static const CodePoints* const kPoints = new CodePoints{{'0', '9'}};
  return *kPoints;
}
const CodePoints& WordCharacters() {
  static const CodePoints* const kPoints =
      new CodePoints{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
  return *kPoints;
}
const CodePoints& Spaces() {
  static const CodePoints* const kPoints = new CodePoints{{'\t', '\r'}, {' ', ' '}};
  return *kPoints;
}
const CodePoints& LineEnds() {
  static const CodePoints* const kPoints =
      new CodePoints{{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
  return *kPoints;
}

class RegexParser {
 public:
  RegexParser(absl::string_view regex, const CodePoints& within, Grammar* grammar)
      : in_(regex), within_(within), grammar_(grammar) {}

  absl::StatusOr<Grammar::Sequence> Parse() {
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence all, Alternatives(0));
    if (!in_.done()) return in_.Error("a ) without its (");
    return all;
  }

 private:
  absl::StatusOr<Grammar::Sequence> Alternatives(int depth) {
    if (depth > kMaxDepth) return in_.Error("groups are nested too deeply");
    std::vector<Grammar::Sequence> alternatives;
    do {
      MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence sequence, Concatenation(depth));
      alternatives.push_back(std::move(sequence));
    } while (in_.Consume("|"));
    return grammar_->OneOf(std::move(alternatives));
  }

  absl::StatusOr<Grammar::Sequence> Concatenation(int depth) {
    Grammar::Sequence sequence;
    // The whole text is matched anyway.
    in_.Consume("^");
    while (!in_.done() && in_.Peek() != '|' && in_.Peek() != ')') {
      if (in_.Consume("$")) {
        if (in_.done() || in_.Peek() == '|' || in_.Peek() == ')') break;
        return in_.Error("$ is only possible at the end");
      }
      MMFREE_ASSIGN_OR_RETURN(const Grammar::Sequence item, Repeated(depth));
      sequence.insert(sequence.end(), item.begin(), item.end());
    }
    return sequence;
  }

  absl::StatusOr<Grammar::Sequence> Repeated(int depth) {
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence item, Atom(depth));
    for (;;) {
      MMFREE_ASSIGN_OR_RETURN(const std::optional<Quantifier> count, TakeQuantifier(&in_));
      if (!count.has_value()) return item;
      in_.Consume("?");  // lazy or not, the texts are the same
      item = grammar_->Repeat(item, count->min, count->max);
    }
  }

  absl::StatusOr<Grammar::Sequence> Atom(int depth) {
    if (in_.Consume("(")) return Group(depth);
    if (in_.Consume("[")) {
      MMFREE_ASSIGN_OR_RETURN(const CodePoints points, Class());
      return Character(points);
    }
    if (in_.Consume(".")) return Character(Complement(LineEnds()));
    if (in_.Consume("\\")) {
      MMFREE_ASSIGN_OR_RETURN(const CodePoints points, Escape());
      return Character(points);
    }
    const char c = in_.Peek();
    if (c == '*' || c == '+' || c == '?' || c == '{') return in_.Error("nothing to repeat");
    if (c == '^') return in_.Error("^ is only possible at the beginning");
    const uint32_t point = in_.TakeCharacter();
    return Character({{point, point}});
  }

  absl::StatusOr<Grammar::Sequence> Group(int depth) {
    if (in_.Consume("?")) {
      const bool named = in_.Consume("P<") || (in_.Peek() == '<' && in_.Consume("<"));
      if (named) {
        if (in_.Peek() == '=' || in_.Peek() == '!') return in_.Unsupported("look-behind is");
        while (!in_.done() && in_.Peek() != '>') in_.TakeCharacter();
        if (!in_.Consume(">")) return in_.Error("a group's name has no end");
      } else if (!in_.Consume(":")) {
        return in_.Unsupported("(? with anything but : or a name is");
      }
    }
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence inner, Alternatives(depth + 1));
    if (!in_.Consume(")")) return in_.Error("a ( without its )");
    return inner;
  }

  // After "[".
  absl::StatusOr<CodePoints> Class() {
    const bool negated = in_.Consume("^");
    CodePoints points;
    for (bool first = true; first || in_.Peek() != ']'; first = false) {
      if (in_.done()) return in_.Error("a [ without its ]");
      if (in_.Peek() == ']' && first) break;  // an empty class
      MMFREE_ASSIGN_OR_RETURN(const CodePoints low, ClassItem());
      const bool single = low.size() == 1 && low[0].first == low[0].second;
      const size_t before = in_.at();
      if (single && in_.Consume("-") && in_.Peek() != ']' && !in_.done()) {
        MMFREE_ASSIGN_OR_RETURN(const CodePoints high, ClassItem());
        if (high.size() != 1 || high[0].first != high[0].second || high[0].first < low[0].first) {
          return in_.Error("a range of characters has no order");
        }
        points.emplace_back(low[0].first, high[0].first);
      } else {
        in_.Rewind(before);
        points.insert(points.end(), low.begin(), low.end());
      }
    }
    in_.Consume("]");
    return negated ? Complement(points) : points;
  }

  absl::StatusOr<CodePoints> ClassItem() {
    if (in_.Consume("\\")) {
      if (in_.Consume("b")) return CodePoints{{'\b', '\b'}};
      return Escape();
    }
    const uint32_t point = in_.TakeCharacter();
    return CodePoints{{point, point}};
  }

  // After "\".
  absl::StatusOr<CodePoints> Escape() {
    if (in_.done()) return in_.Error("a \\ at the end");
    const size_t start = in_.at();
    const uint32_t c = in_.TakeCharacter();
    const auto one = [](uint32_t point) { return CodePoints{{point, point}}; };
    switch (c) {
      case 'd':
        return Digits();
      case 'D':
        return Complement(Digits());
      case 'w':
        return WordCharacters();
      case 'W':
        return Complement(WordCharacters());
      case 's':
        return Spaces();
      case 'S':
        return Complement(Spaces());
      case 'n':
        return one('\n');
      case 'r':
        return one('\r');
      case 't':
        return one('\t');
      case 'f':
        return one('\f');
      case 'v':
        return one('\v');
      case '0':
        return one(0);
      case 'x': {
        MMFREE_ASSIGN_OR_RETURN(const uint32_t point, in_.TakeHex(2));
        return one(point);
      }
      case 'u': {
        MMFREE_ASSIGN_OR_RETURN(const uint32_t point, in_.TakeHex(4));
        if (point >= 0xd800 && point <= 0xdfff) return in_.Unsupported("surrogates are");
        return one(point);
      }
      default:
        break;
    }
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
      in_.Rewind(start);
      return in_.Unsupported(absl::StrCat("\\", std::string(1, static_cast<char>(c)), " is"));
    }
    return one(c);
  }

  Grammar::Sequence Character(const CodePoints& points) {
    return grammar_->Character(Intersection(points, within_));
  }

  TextReader in_;
  const CodePoints& within_;
  Grammar* const grammar_;
};

}  // namespace

absl::StatusOr<Grammar::Sequence> ParseRegex(absl::string_view regex, const CodePoints& within,
                                             Grammar* grammar) {
  return RegexParser(regex, within, grammar).Parse();
}

absl::StatusOr<Grammar> GrammarOfRegex(absl::string_view regex) {
  Grammar grammar;
  const Grammar::Rule root = grammar.AddRule();
  const CodePoints all = {{0, kLastCodePoint}};
  MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence sequence, ParseRegex(regex, all, &grammar));
  grammar.AddAlternative(root, std::move(sequence));
  MMFREE_RETURN_IF_ERROR(grammar.Finish(root));
  return grammar;
}

}  // namespace mmfree
