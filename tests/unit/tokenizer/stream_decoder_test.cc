#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "server/tokenizer/tokenizer.h"
#include "server/tokenizer/utf8.h"
#include "tests/unit/tokenizer/test_models.h"

namespace mmfree {
namespace {

constexpr int32_t kFirstByteId = 3;  // <0x00>; the bytes stand in order

class StreamDecoderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(TalesDirectory(), kTalesVocabulary);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *tokenizer;
    ASSERT_EQ(tokenizer_->Piece(kFirstByteId), "<0x00>");
    ASSERT_EQ(tokenizer_->Piece(kFirstByteId + 255), "<0xFF>");
  }

  // The deltas, the one of Finish last.
  std::vector<std::string> Stream(const std::vector<int32_t>& ids, bool starts_text) const {
    StreamDecoder decoder(tokenizer_.get(), starts_text);
    std::vector<std::string> deltas;
    deltas.reserve(ids.size() + 1);
    for (const int32_t id : ids) deltas.push_back(decoder.Append(id));
    deltas.push_back(decoder.Finish());
    return deltas;
  }

  // The text by its definition: join the bytes, drop the prefix, repair. Shares only the repair
  // with the code under test, and that has its own test.
  std::string Expected(const std::vector<int32_t>& ids, bool starts_text) const {
    if (!ids.empty() && ids[0] == tokenizer_->bos_id()) starts_text = true;
    std::string bytes;
    std::string text;
    for (const int32_t id : ids) {
      absl::string_view piece = tokenizer_->TokenBytes(id);
      const bool is_byte = id >= kFirstByteId && id < kFirstByteId + 256;
      if (bytes.empty() && starts_text && !is_byte && id != 0 && piece.substr(0, 1) == " ") {
        piece.remove_prefix(1);
        starts_text = false;
      }
      if (!piece.empty()) starts_text = false;
      bytes += std::string(piece);
    }
    Utf8Decoder repair;
    repair.Append(bytes, &text);
    repair.Finish(&text);
    return text;
  }

  void CheckAll(const std::vector<int32_t>& ids) const {
    for (const bool starts_text : {true, false}) {
      const auto decoded = tokenizer_->Decode(ids, starts_text);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      std::string joined;
      for (const std::string& delta : Stream(ids, starts_text)) {
        ASSERT_EQ(FindInvalidUtf8(delta), delta.size()) << "a delta is not valid UTF-8";
        joined += delta;
      }
      ASSERT_EQ(joined, *decoded);
      ASSERT_EQ(*decoded, Expected(ids, starts_text));
    }
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
};

TEST_F(StreamDecoderTest, DeltasJoinToDecodeForAnyTokens) {
  std::mt19937 random(7);
  const auto byte = [&](uint8_t low, uint8_t high) {
    return kFirstByteId + low + static_cast<int32_t>(random() % (high - low + 1u));
  };
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 30; ++i) {
      switch (random() % 6) {
        case 0:
          ids.push_back(static_cast<int32_t>(random() % kTalesVocabulary));
          break;
        case 1:
          ids.push_back(static_cast<int32_t>(random() % 3));  // <unk>, <s>, </s>
          break;
        case 2:
          ids.push_back(byte(0xC0, 0xFF));
          break;
        case 3:
          ids.push_back(byte(0x80, 0xBF));
          break;
        case 4:  // a whole character, most of the time
          ids.insert(ids.end(), {byte(0xE1, 0xEC), byte(0x80, 0xBF), byte(0x80, 0xBF)});
          break;
        default:
          ids.insert(ids.end(),
                     {byte(0xF0, 0xF4), byte(0x8F, 0xBF), byte(0x80, 0xBF), byte(0x80, 0xBF)});
      }
    }
    ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(random() % ids.size()));
    ASSERT_NO_FATAL_FAILURE(CheckAll(ids));
  }
  CheckAll({});
}

TEST_F(StreamDecoderTest, ACharacterOfBytesAppearsWithItsLastByte) {
  for (const std::string character : {"é", "ß", "日", "☃", "🐺", "👩", "\U0010FFFF"}) {
    StreamDecoder decoder(tokenizer_.get(), false);
    for (size_t i = 0; i < character.size(); ++i) {
      const bool last = i + 1 == character.size();
      EXPECT_EQ(decoder.Append(kFirstByteId + static_cast<uint8_t>(character[i])),
                last ? character : "");
    }
    EXPECT_EQ(decoder.Finish(), "");
  }
}

TEST_F(StreamDecoderTest, AnUnfinishedCharacterBecomesOneReplacement) {
  StreamDecoder decoder(tokenizer_.get(), false);
  for (const int32_t byte : {0xF0, 0x9F, 0x90}) EXPECT_EQ(decoder.Append(kFirstByteId + byte), "");
  EXPECT_EQ(decoder.Finish(), "\uFFFD");
  EXPECT_EQ(decoder.Finish(), "");
}

TEST_F(StreamDecoderTest, GeneratedTextKeepsItsLeadingSpaceAfterAPrompt) {
  const auto ids = tokenizer_->Encode("the king", {.bos = false});
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(Stream(*ids, /*starts_text=*/false), (std::vector<std::string>{" the", " king", ""}));
  EXPECT_EQ(Stream(*ids, /*starts_text=*/true), (std::vector<std::string>{"the", " king", ""}));
}

TEST_F(StreamDecoderTest, IdsOutOfRangeAddNothing) {
  StreamDecoder decoder(tokenizer_.get(), true);
  for (const int32_t id : {-1, 4096, INT32_MIN, INT32_MAX}) EXPECT_EQ(decoder.Append(id), "");
  EXPECT_EQ(decoder.Finish(), "");
}

TEST_F(StreamDecoderTest, WithoutDummyPrefixNothingIsDropped) {
  const auto tokenizer = LoadFromMemory(TalesModel() + NormalizerOverride(false, false));
  ASSERT_NE(tokenizer, nullptr);
  for (const std::string text : {"the king", " the king", "  x"}) {
    const auto ids = tokenizer->Encode(text, {});
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(*tokenizer->Decode(*ids, true), text);
  }
}

}  // namespace
}  // namespace mmfree
