#include "server/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "server/tokenizer/utf8.h"
#include "tests/unit/tokenizer/test_models.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(TalesDirectory(), kTalesVocabulary);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *tokenizer;
  }

  std::vector<int32_t> Encode(absl::string_view text, Tokenizer::EncodeOptions options = {}) const {
    auto ids = tokenizer_->Encode(text, options);
    EXPECT_TRUE(ids.ok()) << ids.status();
    return ids.ok() ? *ids : std::vector<int32_t>();
  }

  std::vector<int32_t> Continue(absl::string_view text) const {
    return Encode(text, {.continuation = true});
  }

  std::string Decode(const std::vector<int32_t>& ids, bool starts_text = true) const {
    auto text = tokenizer_->Decode(ids, starts_text);
    EXPECT_TRUE(text.ok()) << text.status();
    return text.ok() ? *text : std::string();
  }

  std::vector<std::string> Pieces(const std::vector<int32_t>& ids) const {
    std::vector<std::string> pieces;
    for (const int32_t id : ids) pieces.emplace_back(tokenizer_->Piece(id));
    return pieces;
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
};

// The reference's prompts and the ids it fed to the model.
TEST_F(TokenizerTest, GoldenPromptsGiveTheReferenceIds) {
  std::ifstream file(std::string(MMFREE_SOURCE_DIR) + "/tests/golden/tales.safetensors",
                     std::ios::binary);
  const std::string data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  ASSERT_GT(data.size(), 8u);
  uint64_t header_size = 0;
  std::memcpy(&header_size, data.data(), sizeof(header_size));
  const auto header = nlohmann::json::parse(data.substr(8, header_size));
  const auto& metadata = header["__metadata__"];

  int texts = 0;
  for (int n = 0; n < 13; ++n) {
    const std::string prefix = std::to_string(n);
    const size_t begin = header[prefix + ".ids"]["data_offsets"][0];
    const size_t end = header[prefix + ".ids"]["data_offsets"][1];
    std::vector<int32_t> ids((end - begin) / sizeof(int32_t));
    std::memcpy(ids.data(), data.data() + 8 + header_size + begin, end - begin);

    const std::string decoded = Decode(ids);
    if (metadata.contains(prefix + ".text")) {
      ++texts;
      const std::string text = metadata[prefix + ".text"];
      EXPECT_EQ(Encode(text), ids) << text;
      // The normalizer of this model drops extra spaces; all else comes back.
      EXPECT_EQ(decoded, n == 7 ? text.substr(2) : text);
    } else {
      EXPECT_EQ(Encode(decoded), ids) << decoded;
    }
  }
  EXPECT_EQ(texts, 12);
}

TEST_F(TokenizerTest, BosComesFirstOnlyWhenAskedFor) {
  EXPECT_EQ(tokenizer_->bos_id(), 1);
  EXPECT_EQ(tokenizer_->eos_id(), 2);
  EXPECT_EQ(tokenizer_->size(), kTalesVocabulary);
  EXPECT_THAT(Encode(""), ElementsAre(1));
  EXPECT_THAT(Encode("", {.bos = false}), ElementsAre());
  EXPECT_EQ(Pieces(Encode("the king")), (std::vector<std::string>{"<s>", "▁the", "▁king"}));
  EXPECT_EQ(Pieces(Encode("the king", {.bos = false})),
            (std::vector<std::string>{"▁the", "▁king"}));
}

TEST_F(TokenizerTest, ContinuationIsEncodedExactlyAsGiven) {
  EXPECT_THAT(Continue(""), ElementsAre());
  for (const std::string text : {"the king", " the king", "  the king", "the king ", " ", "   ",
                                 "\n the  king\t", "🐺 ", "▁", " ▁ "}) {
    EXPECT_EQ(Decode(Continue(text), /*starts_text=*/false),
              absl::StrReplaceAll(text, {{"▁", " "}}));
    EXPECT_EQ(Encode(text, {.bos = true, .continuation = true}), Continue(text));
  }
}

TEST_F(TokenizerTest, PromptAndContinuationMakeTheWholeText) {
  const std::string prompt = "Once upon a time";
  for (const std::string next : {" there was a wolf.", "s  there were", "", "\n", " 日本語 🐺"}) {
    std::vector<int32_t> ids = Encode(prompt);
    const std::vector<int32_t> more = Continue(next);
    ids.insert(ids.end(), more.begin(), more.end());
    EXPECT_EQ(Decode(ids), prompt + next);
  }
}

TEST_F(TokenizerTest, NothingInATextIsSpecial) {
  for (const std::string text : {"<s>", "</s>", "<unk>", "<0x0A>", "a<s>b</s><0xF0>"}) {
    const std::vector<int32_t> ids = Encode(text, {.bos = false});
    for (const int32_t id : ids) {
      EXPECT_FALSE(tokenizer_->TokenBytes(id).empty()) << text;
      EXPECT_NE(tokenizer_->Piece(id), text);
    }
    EXPECT_EQ(Decode(ids), text);
  }
}

TEST_F(TokenizerTest, EveryCharacterRoundTrips) {
  std::string text;
  for (uint32_t code = 1; code <= 0x10FFFF; ++code) {
    if (code == ' ' || code == 0x2581 || (code >= 0xD800 && code <= 0xDFFF)) continue;
    if (code < 0x80) {
      text.push_back(static_cast<char>(code));
      continue;
    }
    const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    text.push_back(static_cast<char>((0xF00 >> (extra + 1) & 0xFF) | code >> (6 * extra)));
    for (int k = extra - 1; k >= 0; --k) {
      text.push_back(static_cast<char>(0x80 | (code >> (6 * k) & 0x3F)));
    }
  }
  ASSERT_EQ(FindInvalidUtf8(text), text.size());
  EXPECT_TRUE(Decode(Encode(text)) == text);
  EXPECT_EQ(Decode(Encode(std::string("a\0b", 3))), std::string("a\0b", 3));
}

TEST_F(TokenizerTest, EncodeRefusesInvalidUtf8) {
  const auto ids = tokenizer_->Encode("wolf \xF0\x9F\x90", {});
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("not valid UTF-8 at byte 5"));
}

TEST_F(TokenizerTest, DecodeRefusesIdsOutOfRange) {
  for (const int32_t bad : {-1, 4096, INT32_MIN, INT32_MAX}) {
    const auto text = tokenizer_->Decode({1, 300, bad}, true);
    EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(text.status().message()),
                HasSubstr("token id " + std::to_string(bad) + " at index 2"));
    EXPECT_EQ(tokenizer_->TokenBytes(bad), "");
    EXPECT_EQ(tokenizer_->Piece(bad), "");
  }
}

TEST_F(TokenizerTest, OnlyTheDummyPrefixIsDroppedAtTheStart) {
  const std::vector<int32_t> the = Encode("the", {.bos = false});  // "▁the"
  ASSERT_EQ(Pieces(the), std::vector<std::string>{"▁the"});
  const int32_t id = the[0];
  EXPECT_EQ(Decode({id, id}), "the the");
  EXPECT_EQ(Decode({id, id}, /*starts_text=*/false), " the the");
  EXPECT_EQ(Decode({1, id}, /*starts_text=*/false), "the");           // BOS starts a text
  EXPECT_EQ(Decode({id, 1, id}, /*starts_text=*/false), " the the");  // a later one does not
  EXPECT_EQ(Decode({2, 1, id}), "the");                               // control tokens show nothing
  const int32_t space_byte = 3 + ' ';
  ASSERT_EQ(tokenizer_->Piece(space_byte), "<0x20>");
  EXPECT_EQ(Decode({space_byte, id}), "  the");  // a byte is text, not a prefix
  EXPECT_EQ(Decode({0}), " \u2047 ");            // <unk>, as the trainer settings say
}

}  // namespace
}  // namespace mmfree
