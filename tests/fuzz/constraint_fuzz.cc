// Any text as a regular expression, a GBNF grammar or a JSON schema, and a walk through what it
// allows.
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "server/sampling/constraint.h"
#include "server/tokenizer/utf8.h"
#include "tests/fuzz/fuzz_target.h"

namespace mmfree {
namespace {

constexpr int kSteps = 48;

// Each byte, and some longer tokens.
Vocabulary ByteVocabulary() {
  std::vector<std::string> bytes(3);
  for (int byte = 0; byte < 256; ++byte) bytes.emplace_back(1, static_cast<char>(byte));
  for (const char* piece :
       {"\"", " \"", "{\"", "\":", "ab", "abc", "true", "\", \"", "12", "}}", "\u00e9", "[]"}) {
    bytes.emplace_back(piece);
  }
  const auto trie = std::make_shared<const TokenTrie>(bytes);
  return {trie, trie};
}

const Vocabulary& TheVocabulary() {
  static const Vocabulary* const vocabulary = new Vocabulary(ByteVocabulary());
  return *vocabulary;
}

void Walk(const std::shared_ptr<CompiledConstraint>& constraint, bool is_json, uint32_t seed) {
  const TokenTrie& trie = *TheVocabulary().running;
  std::mt19937 random(seed);
  ConstraintCursor cursor(constraint, false);
  std::string text;
  for (int step = 0; step < kSteps; ++step) {
    const std::shared_ptr<const TokenMask> mask = cursor.Mask();
    if (mask == nullptr) return;  // beyond the bounds
    std::vector<int32_t> choices;
    for (int32_t id = 0; id < trie.vocab_size(); ++id) {
      if (mask->Has(id)) choices.push_back(id);
    }
    if (is_json && cursor.complete()) MMFREE_FUZZ_CHECK(nlohmann::json::accept(text));
    if (choices.empty()) {
      MMFREE_FUZZ_CHECK(cursor.complete());
      return;
    }
    const auto excluded = static_cast<int32_t>(random() % trie.vocab_size());
    if (!mask->Has(excluded) && !trie.bytes(excluded).empty()) {
      ConstraintCursor other = cursor;
      other.Append(excluded);
      MMFREE_FUZZ_CHECK(other.dead());
    }
    const int32_t token = choices[random() % choices.size()];
    text += std::string(trie.bytes(token));
    cursor.Append(token);
    MMFREE_FUZZ_CHECK(!cursor.dead());
  }
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  std::vector<std::string> seeds;
  for (const char* regex : {"", "a", "(North|South){2}-[0-9]{3}", "^\\w+@\\w+\\.(com|org)$",
                            "[^a-z\\d]{2,4}?", "(?:a|b(?<n>c*)+)?\\u00e9\\x41", ".*a.{7}",
                            "(a?){30}(b|ab)*", "[]", "\\D\\S\\W[\\]\\-\\\\]"}) {
    seeds.push_back(std::string("\0\1", 2) + regex);
  }
  for (const char* grammar :
       {"root ::= \"a\" b\nb ::= \"b\" | c # comment\nc ::= [a-c^]{2,3}? (\"x\" root)*",
        "root ::= \"(\" root \")\" | .", "root ::= a\na ::= b \"1\"\nb ::= a | \"2\"",
        "root ::= [^\\x00-\\x7f] \"\\u00e9\\U0001f43a\" x+\nx ::= \"\" | y\ny ::= x | \"y\""}) {
    seeds.push_back(std::string("\1\1", 2) + grammar);
  }
  for (
      const char* schema :
      {"true", "{}", R"({"type": ["integer", "null"], "minimum": -3, "exclusiveMaximum": 12})",
       R"({"properties": {"a~/": {"type": "string", "maxLength": 3}, "b": {}}, "required": ["b", "c"]})",
       R"({"prefixItems": [{"const": {"x": [1, null]}}, {"enum": ["\u00e9\"", 1.5e3]}], "items": false})",
       R"({"$defs": {"t": {"items": {"$ref": "#/$defs/t"}, "maxItems": 2, "type": "array"}}, "$ref": "#/$defs/t"})",
       R"({"anyOf": [{"type": "string", "pattern": "^[a-f]{2}$"}, {"type": "boolean"}]})",
       R"({"additionalProperties": {"type": "number"}, "minProperties": 1, "maxProperties": 2})",
       R"({"allOf": [{"oneOf": [{"type": "null"}, {"type": "array", "minItems": 1}]}]})"}) {
    seeds.push_back(std::string("\2\1", 2) + schema);
  }
  return seeds;
}

}  // namespace mmfree

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  using Cache = mmfree::ConstraintCache;
  mmfree::FuzzInput in(input, size);
  constexpr Cache::Kind kKinds[] = {Cache::Kind::kRegex, Cache::Kind::kGrammar,
                                    Cache::Kind::kJsonSchema};
  const Cache::Kind kind = kKinds[in.Byte() % 3];
  const uint32_t seed = in.Byte();
  const std::string text = in.Rest();
  // The protos hold valid UTF-8 only.
  if (mmfree::FindInvalidUtf8(text) != text.size()) return 0;
  Cache cache([] { return mmfree::TheVocabulary(); });
  const auto constraint = cache.Compile(kind, text);
  if (constraint.ok()) mmfree::Walk(*constraint, kind == Cache::Kind::kJsonSchema, seed);
  return 0;
}
