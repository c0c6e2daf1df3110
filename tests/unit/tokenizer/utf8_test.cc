#include "server/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"

namespace mmfree {
namespace {

std::string Utf8(uint32_t code) {
  if (code < 0x80) return {static_cast<char>(code)};
  if (code < 0x800) {
    return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
  }
  if (code < 0x10000) {
    return {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3F)),
            static_cast<char>(0x80 | (code & 0x3F))};
  }
  return {static_cast<char>(0xF0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 0x3F)),
          static_cast<char>(0x80 | (code >> 6 & 0x3F)), static_cast<char>(0x80 | (code & 0x3F))};
}

template <typename Visit>
void ForEachScalarValue(Visit visit) {
  for (uint32_t code = 0; code <= 0x10FFFF; ++code) {
    if (code < 0xD800 || code > 0xDFFF) visit(Utf8(code));
  }
}

std::string DecodeAll(const std::string& bytes, size_t group) {
  Utf8Decoder decoder;
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += group) decoder.Append(bytes.substr(i, group), &out);
  decoder.Finish(&out);
  return out;
}

// Repair by the definition: from a list of all characters and all their beginnings.
class Definition {
 public:
  Definition() {
    ForEachScalarValue([&](const std::string& character) {
      characters_.insert(character);
      for (size_t n = 1; n < character.size(); ++n) beginnings_.insert(character.substr(0, n));
    });
  }

  std::string Repair(const std::string& bytes) const {
    std::string out;
    for (size_t i = 0; i < bytes.size();) {
      size_t n = 1;
      while (i + n <= bytes.size() && beginnings_.contains(bytes.substr(i, n))) ++n;
      if (i + n <= bytes.size() && characters_.contains(bytes.substr(i, n))) {
        out += bytes.substr(i, n);
        i += n;
      } else {
        out += "\uFFFD";
        i += n > 1 ? n - 1 : 1;  // the maximal subpart, or one byte that begins nothing
      }
    }
    return out;
  }

 private:
  absl::flat_hash_set<std::string> characters_;
  absl::flat_hash_set<std::string> beginnings_;
};

TEST(Utf8DecoderTest, EveryCharacterPassesByteByByteAndIsWithheldUntilComplete) {
  Utf8Decoder decoder;
  ForEachScalarValue([&](const std::string& character) {
    std::string out;
    for (size_t i = 0; i + 1 < character.size(); ++i) {
      decoder.Append(character.substr(i, 1), &out);
      ASSERT_EQ(out, "");
    }
    decoder.Append(character.substr(character.size() - 1), &out);
    ASSERT_EQ(out, character);
    ASSERT_EQ(FindInvalidUtf8(character), character.size());
  });
  std::string out;
  decoder.Finish(&out);
  EXPECT_EQ(out, "");
}

// The examples of the Unicode Standard, section 3.9, tables 3-8 to 3-11.
TEST(Utf8DecoderTest, ReplacesMaximalSubpartsAsInTheStandard) {
  const std::string r = "\uFFFD";
  EXPECT_EQ(DecodeAll("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", 1),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(DecodeAll("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", 1),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(DecodeAll("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", 1),
            r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(DecodeAll("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", 1), r + r + r + r + "A");
}

TEST(Utf8DecoderTest, RandomBytesAreRepairedAsDefinedWhateverTheGrouping) {
  const Definition definition;
  std::mt19937 random(20240607);
  // Bytes where the rules change, so that nearly right sequences are common.
  const std::vector<uint8_t> edges = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF,
                                      0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE,
                                      0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (int i = 0; i < 24; ++i) {
      bytes.push_back(static_cast<char>(round % 2 ? random() : edges[random() % edges.size()]));
    }
    const std::string expected = definition.Repair(bytes);
    for (size_t group : {1, 2, 3, 5, 24}) ASSERT_EQ(DecodeAll(bytes, group), expected);
    EXPECT_EQ(FindInvalidUtf8(expected), expected.size());
    EXPECT_EQ(FindInvalidUtf8(bytes) == bytes.size(), bytes == expected);
  }
}

TEST(FindInvalidUtf8Test, PointsAtTheFirstIllFormedSequence) {
  EXPECT_EQ(FindInvalidUtf8(""), 0u);
  EXPECT_EQ(FindInvalidUtf8("wolf \U0001F43A"), 9u);
  EXPECT_EQ(FindInvalidUtf8("wolf \xF0\x9F\x90"), 5u);   // cut short
  EXPECT_EQ(FindInvalidUtf8("wolf \xF0\x9F\x90 "), 5u);  // broken off
  EXPECT_EQ(FindInvalidUtf8("\xED\xA0\x80"), 0u);        // a surrogate
  EXPECT_EQ(FindInvalidUtf8("ab\xC0\x80"), 2u);          // overlong
  EXPECT_EQ(FindInvalidUtf8("\xF4\x90\x80\x80"), 0u);    // above U+10FFFF
}

}  // namespace
}  // namespace mmfree
