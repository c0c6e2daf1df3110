#include "server/sampling/json_text.h"

#include <initializer_list>

#include "absl/strings/string_view.h"

namespace mmfree {
namespace {

using Sequence = Grammar::Sequence;

Sequence Join(std::initializer_list<Sequence> parts) {
  Sequence all;
  for (const Sequence& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Any of some ASCII characters.
Sequence AnyOf(absl::string_view characters, Grammar* grammar) {
  CodePoints points;
  for (const char c : characters) {
    const uint32_t point = static_cast<unsigned char>(c);
    points.emplace_back(point, point);
  }
  return grammar->Character(points);
}

}  // namespace

CodePoints PlainJsonCharacters() { return Complement({{0, 0x1f}, {'"', '"'}, {'\\', '\\'}}); }

Sequence JsonStringCharacter(Grammar* grammar) {
  const Sequence hex = AnyOf("0123456789abcdefABCDEF", grammar);
  const Sequence not_d = AnyOf("0123456789abcefABCEF", grammar);
  // Not a surrogate: half of a character is none.
  const Sequence unit =
      grammar->OneOf({Join({not_d, hex, hex, hex}),
                      Join({AnyOf("dD", grammar), AnyOf("01234567", grammar), hex, hex})});
  return grammar->OneOf({grammar->Character(PlainJsonCharacters()),
                         Join({grammar->Bytes("\\"), AnyOf("\"\\/bfnrt", grammar)}),
                         Join({grammar->Bytes("\\u"), unit})});
}

}  // namespace mmfree
