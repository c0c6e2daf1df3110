#include "server/sampling/regex.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sampling/quantifier.h"
#include "server/sampling/text_reader.h"

namespace mmfree {
namespace {

constexpr int kMaxDepth = 200;

// ECMA-262's classes, with its flag u and without i.
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
  static const CodePoints* const kPoints = new CodePoints{
      {'\t', '\r'},     {' ', ' '},       {0xa0, 0xa0},     {0x1680, 0x1680}, {0x2000, 0x200a},
      {0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f}, {0x3000, 0x3000}, {0xfeff, 0xfeff}};
  return *kPoints;
}
const CodePoints& LineEnds() {
  static const CodePoints* const kPoints =
      new CodePoints{{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
  return *kPoints;
}

bool IsHighSurrogate(uint32_t point) { return point >= 0xd800 && point <= 0xdbff; }
bool IsLowSurrogate(uint32_t point) { return point >= 0xdc00 && point <= 0xdfff; }

class RegexParser {
 public:
  RegexParser(absl::string_view regex, const CodePoints& within, Grammar* grammar)
      : in_(regex), within_(within), grammar_(grammar) {}

  absl::StatusOr<Grammar::Sequence> Parse() {
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence all, Alternatives(0, /*at_start=*/true));
    if (!in_.done()) return in_.Error("a ) without its (");
    return all;
  }

 private:
  // `at_start`: nothing can stand before it, so that ^ is true.
  absl::StatusOr<Grammar::Sequence> Alternatives(int depth, bool at_start) {
    if (depth > kMaxDepth) return in_.Error("groups are nested too deeply");
    std::vector<Grammar::Sequence> alternatives;
    do {
      MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence sequence, Concatenation(depth, at_start));
      alternatives.push_back(std::move(sequence));
    } while (in_.Consume("|"));
    return grammar_->OneOf(std::move(alternatives));
  }

  // The whole text is matched anyway, so anchors add nothing where they are true and are refused
  // elsewhere.
  absl::StatusOr<Grammar::Sequence> Concatenation(int depth, bool at_start) {
    Grammar::Sequence sequence;
    const int64_t ends_before = ends_;
    while (!in_.done() && in_.Peek() != '|' && in_.Peek() != ')') {
      if (in_.Consume("$")) {
        ++ends_;
        continue;
      }
      if (ends_ != ends_before) return in_.Error("$ is only possible at the end");
      if (at_start && in_.Consume("^")) {
        ++starts_;
        continue;
      }
      MMFREE_ASSIGN_OR_RETURN(const Grammar::Sequence item, Repeated(depth, at_start));
      at_start = false;
      sequence.insert(sequence.end(), item.begin(), item.end());
    }
    return sequence;
  }

  absl::StatusOr<Grammar::Sequence> Repeated(int depth, bool at_start) {
    const int64_t anchors = starts_ + ends_;
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence item, Atom(depth, at_start));
    const size_t start = in_.at();
    MMFREE_ASSIGN_OR_RETURN(const std::optional<Quantifier> count, TakeQuantifier(&in_));
    if (!count.has_value()) return item;
    if (starts_ + ends_ != anchors && (count->max < 0 || count->max > 1)) {
      in_.Rewind(start);
      return in_.Error("^ or $ cannot be repeated");
    }
    in_.Consume("?");  // lazy or not, the texts are the same
    // Of two in a row, + may be possessive, which matches less, and others are an error elsewhere.
    const char next = in_.Peek();
    if (next == '*' || next == '+' || next == '?' || next == '{') {
      return in_.Error("what is repeated cannot be repeated again: use a group");
    }
    return grammar_->Repeat(item, count->min, count->max);
  }

  absl::StatusOr<Grammar::Sequence> Atom(int depth, bool at_start) {
    if (in_.Consume("(")) return Group(depth, at_start);
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

  absl::StatusOr<Grammar::Sequence> Group(int depth, bool at_start) {
    if (in_.Consume("?")) {
      const bool named = in_.Consume("P<") || (in_.Peek() == '<' && in_.Consume("<"));
      if (named) {
        if (in_.Peek() == '=' || in_.Peek() == '!') return in_.Unsupported("look-behind is");
        if (!TakeName())
          return in_.Error("expected a group's name of letters, digits and _, and >");
      } else if (!in_.Consume(":")) {
        return in_.Unsupported("(? with anything but : or a name is");
      }
    }
    MMFREE_ASSIGN_OR_RETURN(Grammar::Sequence inner, Alternatives(depth + 1, at_start));
    if (!in_.Consume(")")) return in_.Error("a ( without its )");
    return inner;
  }

  // A name and its ">".
  bool TakeName() {
    if (absl::ascii_isdigit(static_cast<unsigned char>(in_.Peek()))) return false;
    const size_t start = in_.at();
    while (absl::ascii_isalnum(static_cast<unsigned char>(in_.Peek())) || in_.Peek() == '_') {
      in_.TakeCharacter();
    }
    return in_.at() > start && in_.Consume(">");
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
        MMFREE_ASSIGN_OR_RETURN(const uint32_t point, CodePoint());
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

  // After "\u": {...}, four digits, or those of two surrogates.
  absl::StatusOr<uint32_t> CodePoint() {
    uint32_t point = 0;
    if (in_.Consume("{")) {
      do {
        MMFREE_ASSIGN_OR_RETURN(const uint32_t digit, in_.TakeHex(1));
        point = point * 16 + digit;
        if (point > kLastCodePoint) return in_.Error("not a code point");
      } while (!in_.Consume("}"));
    } else {
      MMFREE_ASSIGN_OR_RETURN(point, in_.TakeHex(4));
      if (IsHighSurrogate(point) && in_.Consume("\\u")) {
        MMFREE_ASSIGN_OR_RETURN(const uint32_t low, in_.TakeHex(4));
        if (IsLowSurrogate(low)) point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
      }
    }
    if (IsHighSurrogate(point) || IsLowSurrogate(point)) {
      return in_.Unsupported("half of a surrogate pair is");
    }
    return point;
  }

  Grammar::Sequence Character(const CodePoints& points) {
    return grammar_->Character(Intersection(points, within_));
  }

  TextReader in_;
  const CodePoints& within_;
  Grammar* const grammar_;
  // Anchors that were read: ^ and $.
  int64_t starts_ = 0;
  int64_t ends_ = 0;
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
