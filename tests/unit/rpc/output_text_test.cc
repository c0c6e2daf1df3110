// Text with stop strings, token by token, against the whole text cut at once.
#include "server/rpc/output_text.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/support/fake_model.h"

namespace mmfree {
namespace {

// FakeTokenizer: a token a byte.
std::vector<int32_t> Tokens(const std::string& text) {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(3 + static_cast<unsigned char>(c));
  return ids;
}

struct Cut {
  std::string text;
  std::string matched;  // empty: none
};

// Where `text` first contains one of `strings`, complete at byte `least` or later.
Cut CutAt(const std::string& text, const std::vector<std::string>& strings, size_t least,
          bool include_stop) {
  for (size_t end = 1; end <= text.size(); ++end) {
    if (end < least) continue;
    const std::string read = text.substr(0, end);
    std::string longest;
    for (const std::string& string : strings) {
      if (absl::EndsWith(read, string) && string.size() > longest.size()) longest = string;
    }
    if (longest.empty()) continue;
    return {include_stop ? read : read.substr(0, end - longest.size()), longest};
  }
  return {text, ""};
}

TEST(OutputTextTest, ShowsExactlyTheTextBeforeTheStopStringAndNeverMoreOnTheWay) {
  const FakeTokenizer tokenizer;
  std::mt19937 random(1);
  const std::vector<std::string> letters = {"a", "b", "\u00e9", "\U0001F600"};
  const auto random_text = [&](size_t size) {
    std::string text;
    for (size_t i = 0; i < size; ++i) text += letters[random() % letters.size()];
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 500; ++round) {
    std::vector<std::string> strings;
    for (size_t i = 0; i <= random() % 4; ++i) strings.push_back(random_text(1 + random() % 5));
    OutputText::Options options;
    options.stop_strings = std::make_shared<const StopStrings>(strings);
    options.include_stop = random() % 2 == 0;
    options.min_tokens = static_cast<int64_t>(random() % 20);
    const std::string whole = random_text(40);
    const Cut expected =
        CutAt(whole, strings, static_cast<size_t>(options.min_tokens), options.include_stop);
    OutputText text(&tokenizer, false, options);
    TextStop stop(text);
    std::string shown;
    bool stopped = false;
    for (const int32_t token : Tokens(whole)) {
      shown += text.Append(token);
      ASSERT_TRUE(absl::StartsWith(expected.text, shown)) << "leaked " << shown;
      stopped = stop.Append(token);
      ASSERT_EQ(stopped, text.matched() != nullptr);
      if (stopped) break;
    }
    shown += text.Finish();
    EXPECT_EQ(shown, expected.text);
    ASSERT_EQ(stopped, !expected.matched.empty());
    if (stopped) {
      EXPECT_EQ(*text.matched(), expected.matched);
      ++matches;
    }
  }
  EXPECT_GT(matches, 100);
  EXPECT_LT(matches, 500);
}

// Tokens of one to three bytes, whatever characters they go through.
class ChunkTokenizer final : public Tokenizer {
 public:
  // The ids of `text` cut at random, each new.
  std::vector<int32_t> Cut(const std::string& text, std::mt19937* random) {
    std::vector<int32_t> ids;
    for (size_t begin = 0; begin < text.size();) {
      const size_t size = 1 + (*random)() % 3;
      ids.push_back(static_cast<int32_t>(bytes_.size()));
      bytes_.push_back(text.substr(begin, size));
      begin += size;
    }
    return ids;
  }

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view,
                                              const EncodeOptions&) const override {
    return std::vector<int32_t>();
  }
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool) const override {
    std::string text;
    for (const int32_t id : ids) text += bytes_[static_cast<size_t>(id)];
    return text;
  }
  absl::string_view TokenBytes(int32_t id) const override {
    return bytes_[static_cast<size_t>(id)];
  }
  absl::string_view Piece(int32_t id) const override { return TokenBytes(id); }
  int32_t bos_id() const override { return -1; }
  int32_t eos_id() const override { return -1; }
  int32_t size() const override { return static_cast<int32_t>(bytes_.size()); }

 private:
  std::vector<std::string> bytes_;
};

TEST(OutputTextTest, KeptTokensAndTheRestAreTheShownTextAndSettledOnesAreAmongThem) {
  std::mt19937 random(3);
  const std::vector<std::string> letters = {"a", "b", "\u00e9", "\U0001F600"};
  const auto random_text = [&](size_t size) {
    std::string text;
    for (size_t i = 0; i < size; ++i) text += letters[random() % letters.size()];
    return text;
  };
  int with_rest = 0;
  for (int round = 0; round < 1000; ++round) {
    ChunkTokenizer tokenizer;
    OutputText::Options options;
    options.stop_strings = std::make_shared<const StopStrings>(
        std::vector<std::string>{random_text(3), random_text(1 + random() % 4)});
    options.include_stop = random() % 2 == 0;
    const std::vector<int32_t> tokens = tokenizer.Cut(random_text(40), &random);
    const auto text_of_first = [&](int64_t count) {
      const absl::Span<const int32_t> all = tokens;
      return *tokenizer.Decode(all.first(static_cast<size_t>(count)), false);
    };
    OutputText text(&tokenizer, false, options);
    std::string shown;
    std::vector<int64_t> settled;
    for (const int32_t token : tokens) {
      shown += text.Append(token);
      if (text.matched() != nullptr) break;
      const int64_t now = text.settled_tokens();
      EXPECT_GE(now, settled.empty() ? 0 : settled.back());
      settled.push_back(now);
      // Nothing is settled that was not shown.
      EXPECT_TRUE(absl::StartsWith(shown, text_of_first(now)));
    }
    if (text.matched() == nullptr) continue;
    const OutputText::Kept kept = text.kept();
    EXPECT_EQ(text_of_first(kept.tokens) + kept.rest, shown);
    // The last token is never settled before it is known that it ends the output.
    EXPECT_LE(text.settled_tokens(), static_cast<int64_t>(settled.size()));
    EXPECT_GE(kept.tokens, text.settled_tokens());
    if (!kept.rest.empty()) ++with_rest;
  }
  EXPECT_GT(with_rest, 100);
}

TEST(OutputTextTest, ACopyGoesOnByItself) {
  const FakeTokenizer tokenizer;
  OutputText::Options options;
  options.stop_strings = std::make_shared<const StopStrings>(std::vector<std::string>{"xyz"});
  TextStop stop(OutputText(&tokenizer, false, options));
  EXPECT_FALSE(stop.Append(3 + 'x'));
  EXPECT_FALSE(stop.Append(3 + 'y'));
  const std::unique_ptr<StopCondition> other = stop.Clone();
  EXPECT_FALSE(stop.Append(3 + 'a'));
  EXPECT_TRUE(other->Append(3 + 'z'));
}

// The bytes of a character that never was finished are text, too: U+FFFD.
TEST(OutputTextTest, TheEndOfAnUnfinishedCharacterCanCompleteAStopString) {
  const FakeTokenizer tokenizer;
  const auto expect = [&tokenizer](const std::string& bytes, const std::string& stop, bool include,
                                   const std::string& shown, bool matches, int64_t kept,
                                   int64_t least) {
    OutputText::Options options;
    options.stop_strings =
        std::make_shared<const StopStrings>(std::vector<std::string>{stop, "zz"});
    options.include_stop = include;
    options.min_tokens = least;
    OutputText text(&tokenizer, false, options);
    TextStop condition(text);
    std::string all;
    for (const int32_t token : Tokens(bytes)) {
      all += text.Append(token);
      ASSERT_FALSE(condition.Append(token));
    }
    EXPECT_EQ(all + text.Finish(), shown);
    EXPECT_EQ(text.Finish(), "");
    EXPECT_EQ(condition.Finish(), matches);
    ASSERT_EQ(text.matched() != nullptr, matches);
    if (!matches) return;
    EXPECT_EQ(*text.matched(), stop);
    EXPECT_EQ(text.kept().tokens, kept);
    EXPECT_EQ(text.kept().rest, "");
  };
  expect("ab\xf0\x9f", "\uFFFD", false, "ab", true, 2, 0);
  expect("ab\xf0\x9f", "b\uFFFD", false, "a", true, 1, 0);
  expect("ab\xf0\x9f", "b\uFFFD", true, "ab\uFFFD", true, 4, 0);
  expect("ab\xf0\x9f", "b\uFFFD", false, "ab\uFFFD", false, 0, 5);
  expect("ab\xf0\x9f", "\uFFFDc", false, "ab\uFFFD", false, 0, 0);
}

TEST(OutputTextTest, WithoutStopStringsItIsTheDecoder) {
  const FakeTokenizer tokenizer;
  OutputText text(&tokenizer, false, {});
  EXPECT_EQ(text.Append(3 + 'a'), "a");
  EXPECT_EQ(text.Append(3 + 0xc3), "");
  EXPECT_EQ(text.Finish(), "\uFFFD");
  EXPECT_EQ(text.matched(), nullptr);
}

}  // namespace
}  // namespace mmfree
