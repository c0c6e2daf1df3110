// Regular expressions as grammars, against the standard library's and by their rules.
#include "server/sampling/regex.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <regex>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/support/status_is.h"
#include "tests/unit/sampling/grammar_matcher.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

bool MatchesRegex(absl::string_view regex, absl::string_view text) {
  const absl::StatusOr<Grammar> grammar = GrammarOfRegex(regex);
  EXPECT_THAT(grammar, IsOk()) << regex;
  return grammar.ok() && Matches(*grammar, text);
}

TEST(RegexTest, MatchesWhatTheStandardLibraryMatches) {
  std::mt19937 random(1);
  int matched = 0;
  int total = 0;
  for (const char* regex : {"",
                            "a",
                            "abc",
                            "a|b",
                            "a*",
                            "a+",
                            "a?b",
                            "(ab)*",
                            "(a|b)*c",
                            "(a*)*",
                            "(a|ab)(c|bcd)?",
                            "[a-c]{2,3}",
                            "[^ab]",
                            "(a{2}){1,2}b{0,2}",
                            "a{3,}",
                            "(?:a|b|)c",
                            "a.c",
                            "[\\w]b|c\\d",
                            "(a|)(b|)(c|)",
                            "((a|b)(c|))*",
                            "a*?b+?",
                            "[ab-]c",
                            "\\x61b",
                            "^ab$",
                            "(^a|b$)"}) {
    const std::regex reference(regex);
    const absl::StatusOr<Grammar> grammar = GrammarOfRegex(regex);
    ASSERT_THAT(grammar, IsOk()) << regex;
    for (int i = 0; i < 300; ++i) {
      std::string text;
      for (size_t n = random() % 7; n > 0; --n) text.push_back("abc1-"[random() % 5]);
      const bool expected = std::regex_match(text, reference);
      EXPECT_EQ(Matches(*grammar, text), expected) << regex << " on " << text;
      matched += expected ? 1 : 0;
      ++total;
    }
  }
  EXPECT_GT(matched, 300);
  EXPECT_LT(matched, total - 300);
}

TEST(RegexTest, CharactersAreCodePoints) {
  EXPECT_TRUE(MatchesRegex(".", "\u00e9"));
  EXPECT_TRUE(MatchesRegex("[\u00e0-\u00ff]{2}", "\u00e0\u00ff"));
  EXPECT_FALSE(MatchesRegex("[\u00e0-\u00ff]", "\u0100"));
  EXPECT_TRUE(MatchesRegex("\\u00e9", "\u00e9"));
  EXPECT_TRUE(MatchesRegex("[^a]", "\U0001F600"));
  EXPECT_FALSE(MatchesRegex(".", "\xff"));
  EXPECT_FALSE(MatchesRegex(".", "\xc0\x80"));
  EXPECT_FALSE(MatchesRegex(".", "\xed\xa0\x80"));  // a surrogate
}

TEST(RegexTest, SaysWhatIsWrongAndWhere) {
  const auto expect = [](absl::string_view regex, absl::StatusCode code, const char* what) {
    EXPECT_THAT(GrammarOfRegex(regex), StatusIs(code, HasSubstr(what))) << regex;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  expect("a(b", kInvalid, "at byte 3: a ( without");
  expect("a)b", kInvalid, "a ) without");
  expect("[ab", kInvalid, "a [ without");
  expect("*a", kInvalid, "nothing to repeat");
  expect("a{5,2}", kInvalid, "before its start");
  expect("a{99999}", kInvalid, "count is more");
  // Other dialects differ about these: {0,3} or plain text, a possessive + or a malformed one.
  expect("a{,3}", kInvalid, "at byte 2: expected a count");
  expect("a{}", kInvalid, "expected a count");
  for (const char* twice : {"a**", "a++", "a+*", "a*+", "a???", "a{2}{3}", "(a)?{2}"}) {
    expect(twice, kInvalid, "cannot be repeated again");
  }
  expect("[z-a]", kInvalid, "no order");
  expect("a\\", kInvalid, "at the end");
  expect("(a)\\1", kUnimplemented, "\\1 is not supported");
  expect("\\bword", kUnimplemented, "\\b");
  expect("(?=a)b", kUnimplemented, "(?");
  expect("(?<!a)b", kUnimplemented, "look-behind");
  for (const char* name : {"(?<>a)", "(?<1>a)", "(?<a-b>c)", "(?P<n a)"}) {
    expect(name, kInvalid, "expected a group's name");
  }
  expect("(?P=n)", kUnimplemented, "(?");
  expect("\\ud83dx", kUnimplemented, "surrogate pair");
  expect("\\u{110000}", kInvalid, "not a code point");
  expect("\\u{}", kInvalid, "hexadecimal");
  expect("[]", kInvalid, "nothing can ever match");
  std::string large;
  for (int i = 0; i < 30; ++i) absl::StrAppend(&large, "a{10000}|");
  expect(large, kInvalid, "too large");
  expect(std::string(1000, '('), kInvalid, "too deeply");
}

// ECMA-262's, with its flag u.
TEST(RegexTest, ClassesAreThoseOfTheStandard) {
  for (const char* space : {" ", "\t", "\n", "\v", "\f", "\r", "\u00a0", "\u1680", "\u2003",
                            "\u2028", "\u202f", "\u205f", "\u3000", "\ufeff"}) {
    for (const char* with : {"\\s", "[\\s]", "[^\\S]", "[\\W]", "\\D"}) {
      EXPECT_TRUE(MatchesRegex(with, space)) << with << " on " << space;
    }
    for (const char* without : {"\\S", "[^\\s]", "[\\S\\d]", "\\w"}) {
      EXPECT_FALSE(MatchesRegex(without, space)) << without << " on " << space;
    }
  }
  for (const char* other :
       {"a", "_", "\u0085", "\u200b", "\u180e", "\u00e9", "\u0663", "\U0001F600"}) {
    EXPECT_TRUE(MatchesRegex("\\S", other)) << other;
    EXPECT_FALSE(MatchesRegex("\\s", other)) << other;
  }
  // Digits and word characters are ASCII's.
  EXPECT_FALSE(MatchesRegex("\\d", "\u0663"));
  EXPECT_TRUE(MatchesRegex("\\D", "\u0663"));
  EXPECT_FALSE(MatchesRegex("\\w", "\u00e9"));
  EXPECT_TRUE(MatchesRegex("\\W", "\u00e9"));
}

TEST(RegexTest, WritesCodePointsAsTheStandardDoes) {
  EXPECT_TRUE(MatchesRegex("\\u{1F600}\\u{e9}", "\U0001F600\u00e9"));
  EXPECT_TRUE(MatchesRegex("[\\ud83d\\ude00-\\u{1F602}]", "\U0001F601"));
  EXPECT_TRUE(MatchesRegex("(?<year>\\d{4})-(?P<month>\\d\\d)", "2024-05"));
}

// Where they are true they add nothing; elsewhere nothing could match, so they are refused.
TEST(RegexTest, AnchorsAreOnlyPossibleAtTheEnds) {
  for (const char* regex :
       {"^ab$", "(^a)b", "a(b$)", "((^a|^)ab?$|ab)", "(^)ab($)", "^^ab$$", "(^a)?ab", "^(^a)b"}) {
    EXPECT_TRUE(MatchesRegex(regex, "ab")) << regex;
  }
  for (const char* regex : {"a(^b)", "a^b", "(a|b)(c|^d)", "a$b", "(a$)b", "(a|b$)c", "(a$)?b",
                            "(a$)(b)", "($|a)b", "(^a)*", "(a$)+", "(^a){2}"}) {
    EXPECT_THAT(GrammarOfRegex(regex),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at byte")))
        << regex;
  }
}

}  // namespace
}  // namespace mmfree
