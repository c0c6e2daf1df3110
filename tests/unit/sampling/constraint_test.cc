// Grammars, the automaton that reads by them, and the masks made of it, each against something
// simpler.
#include "server/sampling/constraint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/sampling/gbnf.h"
#include "server/sampling/json_schema.h"
#include "server/sampling/request_sampler.h"
#include "tests/support/status_is.h"
#include "tests/unit/sampling/grammar_matcher.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

TEST(GbnfTest, ReadsTheNotation) {
  const absl::StatusOr<Grammar> grammar = GrammarOfGbnf(R"gbnf(
# Sums of numbers in parentheses.
root   ::= sum "\n"?
sum    ::= term ( [-+] term )*
term   ::= number | "(" sum ")"
         | "x"
number ::= [1-9] [0-9]{0,2}
)gbnf");
  ;
  ASSERT_THAT(grammar, IsOk());
  for (const char* text : {"1", "12+345", "((x))-(1+(2-3))\n", "(x+x)+x"}) {
    EXPECT_TRUE(Matches(*grammar, text)) << text;
  }
  for (const char* text : {"", "0", "1234", "(1", "1)", "1+", "((1)", "x\n\n"}) {
    EXPECT_FALSE(Matches(*grammar, text)) << text;
  }
}

TEST(GbnfTest, SaysWhatIsWrong) {
  const auto expect = [](absl::string_view text, const char* what) {
    EXPECT_THAT(GrammarOfGbnf(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)))
        << text;
  };
  expect("", "no rule \"root\"");
  expect("root ::= other", "\"other\" is not defined");
  expect("root ::= \"a\"\nroot ::= \"b\"", "defined twice");
  expect("root ::= \"a", "without its end");
  expect("root ::= (\"a\"", "a ( without");
  expect("root ::= root \"a\" | \"a\"", "left-recursive");
  expect("root ::= \"\" root \"a\" | \"a\"", "left-recursive");
  expect("root ::= a* root \"b\" | \"c\"\na ::= \"a\"", "left-recursive");
  expect("root ::= \"a\" root", "nothing can ever match");
  expect("root = \"a\"", "expected ::=");
}

TEST(GbnfTest, RecursionThatAddsNothingIsHarmless) {
  const absl::StatusOr<Grammar> grammar =
      GrammarOfGbnf("root ::= root | \"a\" root | ((\"b\"*)*)*");
  ASSERT_THAT(grammar, IsOk());
  EXPECT_TRUE(Matches(*grammar, "aabbb"));
  EXPECT_FALSE(Matches(*grammar, "bba"));
}

// Bytes 0 to 255 as tokens 3 to 258, then longer ones.
Vocabulary TestVocabulary() {
  std::vector<std::string> bytes(3);
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(std::string(1, static_cast<char>(byte)));
  for (const char* piece : {"\"", " \"", "{\"", "\":", "ab", "abc", "true", "\", \"", "12", " {",
                            "}}", "\u00e9", "[]", "null", " ", "1"}) {
    bytes.emplace_back(piece);
  }
  std::vector<std::string> first = bytes;
  for (size_t id = 259; id < first.size(); ++id) {
    if (first[id][0] == ' ') first[id].erase(0, 1);
  }
  return {std::make_shared<const TokenTrie>(bytes), std::make_shared<const TokenTrie>(first)};
}

TEST(CompiledConstraintTest, AMaskHasExactlyTheTokensThatCanFollow) {
  const Vocabulary vocabulary = TestVocabulary();
  ConstraintCache cache(TestVocabulary);
  std::mt19937 random(5);
  for (const char* schema : {"true", R"({"properties": {"ab": {"type": "integer"}}})"}) {
    const auto constraint = cache.Compile(ConstraintCache::Kind::kJsonSchema, schema);
    ASSERT_THAT(constraint, IsOk());
    for (int walk = 0; walk < 20; ++walk) {
      CompiledConstraint::State state = (*constraint)->start();
      for (int step = 0; step < 20; ++step) {
        const bool first = step == 0 && walk % 2 == 0;
        const auto mask = (*constraint)->Mask(state, first);
        const TokenTrie& trie = first ? *vocabulary.first : *vocabulary.running;
        std::vector<int32_t> choices;
        for (int32_t id = 0; id < trie.vocab_size(); ++id) {
          const bool can = !trie.bytes(id).empty() &&
                           (*constraint)->Advance(state, id, first) != GrammarMachine::kDead;
          ASSERT_EQ(mask->Has(id), can) << id;
          if (can) choices.push_back(id);
        }
        if (choices.empty()) {
          EXPECT_TRUE((*constraint)->accepting(state));
          break;
        }
        state = (*constraint)->Advance(state, choices[random() % choices.size()], first);
      }
    }
  }
}

// Ambiguous beyond use: every state is a thousand stacks, and every output leads to new ones.
constexpr char kEndless[] = "([ab]?[bc]?[ac]?){1100}";

TEST(CompiledConstraintTest, BeyondItsBoundsAMaskIsUnknownAndNeverLacksATokenInSilence) {
  const Vocabulary vocabulary = TestVocabulary();
  ConstraintCache used(TestVocabulary);
  const auto constraint = used.Compile(ConstraintCache::Kind::kRegex, kEndless);
  ASSERT_THAT(constraint, IsOk());
  std::mt19937 random(7);
  std::vector<int32_t> output;
  for (int outputs = 0;; ++outputs) {
    ASSERT_LT(outputs, 100) << "there is no bound";
    ConstraintCursor cursor(*constraint, false);
    output.clear();
    while (output.size() < 300 && cursor.Mask() != nullptr) {
      output.push_back(static_cast<int32_t>(3 + 'a' + random() % 3));
      cursor.Append(output.back());
      ASSERT_FALSE(cursor.dead());
    }
    if (cursor.Mask() == nullptr) break;
  }
  EXPECT_TRUE((*constraint)->large());
  EXPECT_LE((*constraint)->bytes(), GrammarMachine::kMaxBytes * 9 / 8);
  // Nothing is drawn there, and nothing is forgotten elsewhere.
  RequestSampler::Options options;
  options.constraint = *constraint;
  RequestSampler sampler(options, vocabulary.running->vocab_size(), {});
  for (const int32_t token : output) sampler.Append(token);
  const std::vector<float> logits(static_cast<size_t>(vocabulary.running->vocab_size()), 0.0f);
  EXPECT_EQ(sampler.Sample(logits, SamplingParams(), 0).token, -1);
  ConstraintCursor start(*constraint, false);
  ASSERT_NE(start.Mask(), nullptr);
  // The next one to ask begins anew and gets as far.
  const auto fresh = used.Compile(ConstraintCache::Kind::kRegex, kEndless);
  ASSERT_THAT(fresh, IsOk());
  EXPECT_NE(*fresh, *constraint);
  ConstraintCursor cursor(*fresh, false);
  for (const int32_t token : output) cursor.Append(token);
  ASSERT_NE(cursor.Mask(), nullptr);
  EXPECT_GE(cursor.Mask()->Count(), 3);
}

TEST(ConstraintCacheTest, WhatIsKeptIsBounded) {
  constexpr size_t kBudget = size_t{4} << 20;
  constexpr size_t kEach = size_t{1} << 20;
  ConstraintCache cache(TestVocabulary, kBudget);
  std::mt19937 random(8);
  std::vector<std::weak_ptr<CompiledConstraint>> made;
  for (int i = 0; i < 12; ++i) {
    const auto constraint =
        cache.Compile(ConstraintCache::Kind::kRegex, absl::StrCat("x{", i, "}", kEndless));
    ASSERT_THAT(constraint, IsOk());
    ConstraintCursor cursor(*constraint, false);
    for (int step = 0; step < i; ++step) cursor.Append(3 + 'x');
    while ((*constraint)->bytes() < kEach) {
      ASSERT_NE(cursor.Mask(), nullptr);
      cursor.Append(static_cast<int32_t>(3 + 'a' + random() % 3));
    }
    made.push_back(*constraint);
  }
  size_t kept = 0;
  for (const auto& constraint : made) {
    if (const auto alive = constraint.lock(); alive != nullptr) kept += alive->bytes();
  }
  // The last one had not grown when it was added.
  EXPECT_LE(kept, kBudget + 2 * kEach);
  EXPECT_GE(kept, kBudget - 2 * kEach);
  EXPECT_FALSE(made.back().expired());
}

TEST(ConstraintCacheTest, TheSameTextIsCompiledOnce) {
  int vocabularies = 0;
  ConstraintCache cache([&vocabularies] {
    ++vocabularies;
    return TestVocabulary();
  });
  const auto regex = cache.Compile(ConstraintCache::Kind::kRegex, "a+");
  ASSERT_THAT(regex, IsOk());
  EXPECT_EQ(*cache.Compile(ConstraintCache::Kind::kRegex, "a+"), *regex);
  EXPECT_NE(*cache.Compile(ConstraintCache::Kind::kRegex, "a*"), *regex);
  for (size_t i = 0; i < ConstraintCache::kMaxEntries; ++i) {
    EXPECT_THAT(cache.Compile(ConstraintCache::Kind::kRegex, absl::StrCat("b", i)), IsOk());
  }
  EXPECT_NE(*cache.Compile(ConstraintCache::Kind::kRegex, "a+"), *regex)
      << "it was used last first";
  EXPECT_EQ(vocabularies, 1);
  EXPECT_THAT(cache.Compile(ConstraintCache::Kind::kRegex, "(a?b?c?d?){9999}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("too many ways")));
  EXPECT_THAT(cache.Compile(ConstraintCache::Kind::kGrammar, "a+"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("::=")));
}

// Random logits stand for a model: whatever it wants, the output conforms.
TEST(ConstrainedSamplingTest, EveryFinishedOutputIsASentence) {
  const Vocabulary vocabulary = TestVocabulary();
  constexpr int32_t kEos = 2;
  ConstraintCache cache(TestVocabulary);
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  int finished = 0;
  const struct {
    ConstraintCache::Kind kind;
    const char* text;
    std::function<bool(const std::string&)> conforms;
  } cases[] = {
      {ConstraintCache::Kind::kRegex, "[a-c]{2,9}(12|true)?",
       [](const std::string& text) {
         return std::regex_match(text, std::regex("[a-c]{2,9}(12|true)?"));
       }},
      {ConstraintCache::Kind::kJsonSchema,
       R"({"properties": {"ab": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}}})",
       [](const std::string& text) {
         const auto json = nlohmann::json::parse(text, nullptr, false);
         return json.is_object() && (!json.contains("ab") || json["ab"].is_number_integer());
       }},
  };
  for (const auto& [kind, text, conforms] : cases) {
    for (uint64_t seed = 0; seed < 60; ++seed) {
      RequestSampler::Options options;
      const auto constraint = cache.Compile(kind, text);
      ASSERT_THAT(constraint, IsOk());
      options.constraint = *constraint;
      options.starts_text = seed % 2 == 0;
      options.end_tokens = {kEos};
      RequestSampler sampler(options, vocabulary.running->vocab_size(), {});
      SamplingParams params;
      params.temperature = 1.0f;
      params.seed = seed;
      const std::vector<int32_t> banned = {kEos};
      std::string output;
      for (uint64_t position = 0; position < 60; ++position) {
        std::vector<float> logits(static_cast<size_t>(vocabulary.running->vocab_size()));
        for (float& logit : logits) logit = normal(random);
        // As with min_new_tokens, which gives way where nothing else can follow.
        params.banned = position < 5 ? absl::MakeConstSpan(banned) : absl::Span<const int32_t>();
        const int32_t token = sampler.Sample(logits, params, position).token;
        ASSERT_GE(token, 0);
        if (token == kEos) {
          EXPECT_TRUE(conforms(output)) << output;
          ++finished;
          break;
        }
        const bool first = options.starts_text && output.empty();
        const absl::string_view bytes =
            (first ? vocabulary.first : vocabulary.running)->bytes(token);
        output.append(bytes.data(), bytes.size());
        sampler.Append(token);
      }
    }
  }
  EXPECT_GT(finished, 90);
}

}  // namespace
}  // namespace mmfree
