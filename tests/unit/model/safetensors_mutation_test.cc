// Damaged files: whatever the bytes, the reader returns, and what it accepts lies inside the file.
// Run under the sanitizers this also shows that no byte outside is read.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/model/safetensors.h"
#include "tests/support/safetensors_writer.h"

namespace mmfree {
namespace {

std::string GoodFile() {
  SafetensorsWriter writer;
  writer.AddMetadata("format", "pt");
  writer.Add("model.embeddings.weight", "F16", {4, 6}, std::string(48, 'a'));
  writer.Add("model.norm.weight", "F32", {6}, std::string(24, 'b'));
  writer.Add("codes", "U8", {3, 5}, std::string(15, 'c'));
  writer.Add("empty", "I32", {0}, "");
  return writer.Finish();
}

// Returns whether the file was accepted, after reading every byte of every tensor.
bool CheckNoHarm(const std::string& file) {
  // A heap block of exactly this size, so that a sanitizer sees one byte too far.
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  const absl::StatusOr<SafetensorsFile> parsed = SafetensorsFile::Parse(bytes, "mutant");
  if (!parsed.ok()) {
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(parsed.status().message().substr(0, 6), "mutant") << parsed.status();
    return false;
  }
  size_t sum = 0;
  for (const TensorView& tensor : parsed->tensors()) {
    EXPECT_GE(tensor.data, bytes.data());
    EXPECT_LE(tensor.data + tensor.bytes, bytes.data() + bytes.size());
    for (int64_t k = 0; k < tensor.bytes; ++k) sum += tensor.data[k];
  }
  return sum != 1;
}

TEST(SafetensorsMutationTest, EveryTruncationIsRefused) {
  const std::string good = GoodFile();
  ASSERT_TRUE(CheckNoHarm(good));
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(CheckNoHarm(good.substr(0, size))) << size;
  }
  EXPECT_FALSE(CheckNoHarm(good + '\0'));
}

TEST(SafetensorsMutationTest, EveryBitFlipOfTheHeaderIsHarmless) {
  const std::string good = GoodFile();
  const size_t header_end = good.size() - 48 - 24 - 15;
  for (size_t byte = 0; byte < header_end; ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string file = good;
      file[byte] = static_cast<char>(file[byte] ^ (1 << bit));
      CheckNoHarm(file);
    }
  }
}

TEST(SafetensorsMutationTest, RandomEditsAreHarmless) {
  const std::string good = GoodFile();
  const char* const kTokens[] = {"{",
                                 "}",
                                 "[",
                                 "]",
                                 "\"",
                                 ":",
                                 ",",
                                 "-1",
                                 "0",
                                 "1e9",
                                 "18446744073709551615",
                                 "9223372036854775807",
                                 "null",
                                 "\\u0000",
                                 "data_offsets",
                                 "shape",
                                 "dtype",
                                 "F32",
                                 "\xff",
                                 "__metadata__",
                                 "4294967296"};
  std::mt19937 random(42);
  for (int n = 0; n < 20000; ++n) {
    std::string file = good;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % (file.size() + 1);
      switch (random() % 4) {
        case 0:
          if (at < file.size()) file[at] = static_cast<char>(random());
          break;
        case 1:
          file.erase(at, random() % 16);
          break;
        case 2:
          file.insert(at, kTokens[random() % std::size(kTokens)]);
          break;
        case 3: {
          // Most lengths are wrong after an edit; put the right one back so that the parser goes
          // on.
          const size_t header_end = file.rfind('}') == std::string::npos ? 0 : file.rfind('}') + 1;
          if (header_end < 8) break;
          for (int k = 0; k < 8; ++k) {
            file[k] = static_cast<char>((static_cast<uint64_t>(header_end - 8) >> (8 * k)) & 0xff);
          }
          break;
        }
      }
    }
    CheckNoHarm(file);
  }
}

TEST(SafetensorsMutationTest, RandomHeadersMadeOfTheFormatsWordsAreHarmless) {
  const char* const kWords[] = {"{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                "\"a\"",
                                "\"b\"",
                                "0",
                                "4",
                                "8",
                                "-4",
                                "4611686018427387904",
                                "\"U8\"",
                                "\"F32\"",
                                "\"dtype\":\"U8\",",
                                "\"shape\":[4],",
                                "\"data_offsets\":[0,4]",
                                "\"data_offsets\":[4,8]",
                                "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}",
                                "\"__metadata__\":{}"};
  std::mt19937 random(43);
  for (int n = 0; n < 20000; ++n) {
    std::string header = "{";
    const int words = static_cast<int>(random() % 12);
    for (int w = 0; w < words; ++w) header += kWords[random() % std::size(kWords)];
    header += "}";
    CheckNoHarm(RawSafetensors(header, std::string(random() % 12, 'x')));
  }
}

}  // namespace
}  // namespace mmfree
