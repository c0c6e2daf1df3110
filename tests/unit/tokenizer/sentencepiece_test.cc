// Our encoder against the SentencePiece library itself, in a process of its own: the library's
// protobuf and the one gRPC uses clash.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "server/tokenizer/tokenizer.h"
#include "server/tokenizer/utf8.h"
#include "tests/unit/tokenizer/sentencepiece_library.h"
#include "tests/unit/tokenizer/test_models.h"

namespace mmfree {
namespace {

struct ModelCase {
  std::string name;
  std::string suffix;  // appended to the demo model
};

class SentencePieceTest : public ::testing::TestWithParam<ModelCase> {
 protected:
  SentencePieceTest()
      : tokenizer_(LoadFromMemory(TalesModel() + GetParam().suffix)),
        library_(TalesModel() + GetParam().suffix) {}

  void SetUp() override {
    ASSERT_NE(tokenizer_, nullptr);
    ASSERT_TRUE(library_.ok());
  }

  void ExpectSame(const std::string& text) const {
    const auto ids = tokenizer_->Encode(text, {.bos = false});
    ASSERT_TRUE(ids.ok()) << ids.status();
    ASSERT_EQ(*ids, library_.Encode(text)) << text.substr(0, 200);
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  SentencePieceLibrary library_;
};

std::string Prose() {
  std::ifstream file(std::string(MMFREE_SOURCE_DIR) + "/LICENSE");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST_P(SentencePieceTest, ProseGivesTheSameIds) {
  const std::string prose = Prose();
  ASSERT_GT(prose.size(), 10000u);  // several parts
  ExpectSame(prose);
  std::string one_line = prose;
  for (char& c : one_line) c = c == '\n' ? ' ' : c;
  ExpectSame(one_line);
  std::string no_spaces;
  for (const char c : prose) {
    if (c != ' ' && c != '\n') no_spaces.push_back(c);
  }
  ExpectSame(no_spaces);
}

TEST_P(SentencePieceTest, RandomTextGivesTheSameIdsAndText) {
  // Few letters, so that merges compete; spaces of both spellings, so that the normalizer works.
  const std::vector<std::string> alphabets[] = {
      {"a", "e", "t", "h", "n", "q", " "},
      {" ", " ", "▁", "t", "\n"},
      {"t", "he", " the", " and", "ing", " ", "  ", "é", "日", "🐺", "▁", "\t", "<", "0x", ">"},
  };
  std::mt19937 random(5);
  for (const auto& alphabet : alphabets) {
    for (int round = 0; round < 1000; ++round) {
      std::string text;
      for (size_t n = random() % 60; n > 0; --n) text += alphabet[random() % alphabet.size()];
      ASSERT_NO_FATAL_FAILURE(ExpectSame(text));
    }
    std::string text;
    for (int n = 0; n < 20000; ++n) text += alphabet[random() % alphabet.size()];
    ASSERT_NO_FATAL_FAILURE(ExpectSame(text));
  }
}

TEST_P(SentencePieceTest, EncodedTextDecodesAsTheLibraryDoes) {
  for (const std::string text :
       {"", "the king", "Ünïcödé — naïve café ☃ 日本語 🐺", "a\n\nb\tc", "“Yes,” she said."}) {
    const auto ids = tokenizer_->Encode(text, {.bos = false});
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(*tokenizer_->Decode(*ids, true), library_.Decode(*ids));
  }
}

TEST_P(SentencePieceTest, LongTextWithoutAPlaceToCutGivesTheSameIds) {
  ExpectSame(std::string(100000, 'e'));
  ExpectSame(std::string(100001, 'q'));
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "tha"[i * i % 3];
  ExpectSame(text);
}

INSTANTIATE_TEST_SUITE_P(
    Models, SentencePieceTest,
    ::testing::Values(ModelCase{"Demo", ""},
                      ModelCase{"LikeLlama", NormalizerOverride(true, false)},
                      ModelCase{"Verbatim", NormalizerOverride(false, false)},
                      ModelCase{"NoDummyPrefix", NormalizerOverride(false, true)},
                      // Pieces of several spaces and across words, and equal scores.
                      ModelCase{"SpacesInPieces",
                                NormalizerOverride(true, false) + ExtraPiece("▁▁", -1) +
                                    ExtraPiece("▁▁▁▁", -2) + ExtraPiece("e▁t", -3) +
                                    ExtraPiece("qq", -3) + ExtraPiece("qqq", -3) +
                                    ExtraPiece("qqqq", -3)}),
    [](const ::testing::TestParamInfo<ModelCase>& info) { return info.param.name; });

}  // namespace
}  // namespace mmfree
