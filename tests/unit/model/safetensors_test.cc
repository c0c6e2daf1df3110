#include "server/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "tests/support/safetensors_writer.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

absl::StatusOr<SafetensorsFile> Parse(const std::string& file) {
  return SafetensorsFile::Parse(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "file");
}

absl::StatusOr<SafetensorsFile> ParseHeader(const json& header, const std::string& data) {
  return Parse(RawSafetensors(header.dump(), data));
}

// A file of one F32 [2, 3] tensor "w" at the start of `data`, with one field replaced.
absl::StatusOr<SafetensorsFile> WithField(const std::string& field, const json& value) {
  json header = {{"w", {{"dtype", "F32"}, {"shape", {2, 3}}, {"data_offsets", {0, 24}}}}};
  header["w"][field] = value;
  return ParseHeader(header, std::string(24, 'x'));
}

TEST(SafetensorsTest, ReadsEveryTypeInTheOrderOfTheData) {
  SafetensorsWriter writer;
  writer.AddMetadata("format", "pt");
  writer.Add("z", "F32", {2}, std::string(8, 'a'));
  writer.Add("y", "F16", {3, 1}, std::string(6, 'b'));
  writer.Add("x", "BF16", {1}, std::string(2, 'c'));
  writer.Add("w", "U8", {2, 2, 2}, std::string(8, 'd'));
  writer.Add("v", "I32", {}, std::string(4, 'e'));
  writer.Add("u", "F32", {0, 5}, "");
  const std::string bytes = writer.Finish();
  const absl::StatusOr<SafetensorsFile> file = Parse(bytes);
  ASSERT_THAT(file, IsOk());
  EXPECT_EQ(file->metadata().at("format"), "pt");
  ASSERT_EQ(file->tensors().size(), 6u);
  const struct {
    const char* name;
    TensorType type;
    std::vector<int64_t> shape;
    std::string data;
  } expected[] = {
      {"z", TensorType::kF32, {2}, "aaaaaaaa"}, {"y", TensorType::kF16, {3, 1}, "bbbbbb"},
      {"x", TensorType::kBF16, {1}, "cc"},      {"w", TensorType::kU8, {2, 2, 2}, "dddddddd"},
      {"v", TensorType::kI32, {}, "eeee"},      {"u", TensorType::kF32, {0, 5}, ""}};
  for (size_t k = 0; k < 6; ++k) {
    const TensorView& tensor = file->tensors()[k];
    EXPECT_EQ(tensor.name, expected[k].name);
    EXPECT_EQ(tensor.type, expected[k].type);
    EXPECT_EQ(tensor.shape, expected[k].shape);
    EXPECT_EQ(std::string(tensor.data, tensor.data + tensor.bytes), expected[k].data);
    EXPECT_EQ(file->Find(expected[k].name), &tensor);
  }
  EXPECT_EQ(file->Find("absent"), nullptr);
}

TEST(SafetensorsTest, OpensAFileOnDiskAndOutlivesItsName) {
  const TempDirectory directory;
  SafetensorsWriter writer;
  writer.Add("w", "U8", {3}, "abc");
  WriteFile(directory.File("f"), writer.Finish());
  absl::StatusOr<SafetensorsFile> opened = SafetensorsFile::Open(directory.File("f"));
  ASSERT_THAT(opened, IsOk());
  const SafetensorsFile file = *std::move(opened);
  std::filesystem::remove(directory.File("f"));
  const TensorView* const tensor = file.Find("w");
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(std::string(tensor->data, tensor->data + tensor->bytes), "abc");
  EXPECT_THAT(SafetensorsFile::Open(directory.File("f")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(directory.File("f"))));
}

TEST(SafetensorsTest, ReadsTheGoldenData) {
  const absl::StatusOr<SafetensorsFile> file =
      SafetensorsFile::Open(MMFREE_SOURCE_DIR "/tests/golden/tales.safetensors");
  ASSERT_THAT(file, IsOk());
  const TensorView* const logits = file->Find("0.fp32.logits_last");
  ASSERT_NE(logits, nullptr);
  EXPECT_EQ(logits->shape, std::vector<int64_t>{4096});
  ASSERT_NE(file->Find("0.ids"), nullptr);
  EXPECT_EQ(file->Find("0.ids")->type, TensorType::kI32);
}

TEST(SafetensorsTest, AFileWithoutTensorsIsLegal) {
  EXPECT_THAT(Parse(RawSafetensors("{}", "")), IsOk());
  EXPECT_THAT(Parse(RawSafetensors("{}   ", "")), IsOk());
}

TEST(SafetensorsTest, RefusesALengthThatDoesNotFit) {
  EXPECT_THAT(Parse(""), StatusIs(kInvalid, HasSubstr("file: truncated: expected at least 8")));
  EXPECT_THAT(Parse("1234567"), StatusIs(kInvalid, HasSubstr("the file has 7")));
  EXPECT_THAT(Parse(std::string(8, '\0')), StatusIs(kInvalid, HasSubstr("is not valid JSON")));
  EXPECT_THAT(Parse(std::string(8, '\xff')),
              StatusIs(kInvalid, HasSubstr("header length is 18446744073709551615")));
  std::string file = RawSafetensors("{}", "");
  file[0] = 3;
  EXPECT_THAT(Parse(file),
              StatusIs(kInvalid, HasSubstr("truncated: its header needs 3 bytes, the file has 2")));
}

TEST(SafetensorsTest, RefusesAHeaderThatIsNotAFlatJsonObject) {
  EXPECT_THAT(Parse(RawSafetensors("[]", "")),
              StatusIs(kInvalid, HasSubstr("file: header: expected a JSON object, got array")));
  EXPECT_THAT(Parse(RawSafetensors("{\"w\":", "")),
              StatusIs(kInvalid, HasSubstr("file: header: is not valid JSON at byte")));
  EXPECT_THAT(Parse(RawSafetensors("{} x", "")), StatusIs(kInvalid, HasSubstr("not valid JSON")));
  EXPECT_THAT(Parse(RawSafetensors("{\"w\":[[[[]]]]}", "")),
              StatusIs(kInvalid, HasSubstr("nested deeper than 3 levels")));
  EXPECT_THAT(Parse(RawSafetensors("{\"w\":" + std::string(1000000, '['), "")),
              StatusIs(kInvalid, HasSubstr("nested deeper than 3 levels")));
  EXPECT_THAT(ParseHeader({{"w", 5}}, ""),
              StatusIs(kInvalid, HasSubstr("tensor \"w\": expected an object")));
  EXPECT_THAT(ParseHeader({{"__metadata__", 5}}, ""),
              StatusIs(kInvalid, HasSubstr("__metadata__: expected an object")));
  EXPECT_THAT(ParseHeader({{"__metadata__", {{"k", 5}}}}, ""),
              StatusIs(kInvalid, HasSubstr("__metadata__: \"k\": expected a string")));
}

TEST(SafetensorsTest, RefusesADuplicateNameHoweverItIsSpelled) {
  const std::string entry = R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  EXPECT_THAT(Parse(RawSafetensors("{\"w\":" + entry + ",\"w\":" + entry + "}", "x")),
              StatusIs(kInvalid, HasSubstr("the key \"w\" appears twice")));
  EXPECT_THAT(Parse(RawSafetensors("{\"w\":" + entry + ",\"\\u0077\":" + entry + "}", "x")),
              StatusIs(kInvalid, HasSubstr("the key \"w\" appears twice")));
  EXPECT_THAT(Parse(RawSafetensors(
                  R"({"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "x")),
              StatusIs(kInvalid, HasSubstr("the key \"dtype\" appears twice")));
}

TEST(SafetensorsTest, RefusesAWrongDtype) {
  EXPECT_THAT(WithField("dtype", "F64"),
              StatusIs(kInvalid, HasSubstr("file: tensor \"w\": dtype: expected F32, F16, BF16, U8 "
                                           "or I32, got \"F64\"")));
  EXPECT_THAT(WithField("dtype", "f32"), StatusIs(kInvalid, HasSubstr("got \"f32\"")));
  EXPECT_THAT(WithField("dtype", 32), StatusIs(kInvalid, HasSubstr("dtype: expected a string")));
  EXPECT_THAT(WithField("dtype", "F16"),
              StatusIs(kInvalid, HasSubstr("expected 12 bytes for F16 [2, 3], got 24")));
}

TEST(SafetensorsTest, RefusesAWrongShape) {
  EXPECT_THAT(WithField("shape", "6"), StatusIs(kInvalid, HasSubstr("shape: expected an array")));
  EXPECT_THAT(WithField("shape", json::array({2, -3})),
              StatusIs(kInvalid, HasSubstr("shape: expected sizes of at least 0")));
  EXPECT_THAT(WithField("shape", json::array({2, 3.0})),
              StatusIs(kInvalid, HasSubstr("shape: expected sizes of at least 0")));
  EXPECT_THAT(WithField("shape", json::array({18446744073709551615u, 1})),
              StatusIs(kInvalid, HasSubstr("shape: expected sizes of at least 0")));
  EXPECT_THAT(WithField("shape", json::array({int64_t{1} << 32, int64_t{1} << 32})),
              StatusIs(kInvalid, HasSubstr("shape: the size in bytes overflows")));
  EXPECT_THAT(WithField("shape", json::array({int64_t{1} << 61})),
              StatusIs(kInvalid, HasSubstr("shape: the size in bytes overflows")));
  EXPECT_THAT(WithField("shape", json::array({1, 1, 1, 1, 1, 1, 1, 2, 3})),
              StatusIs(kInvalid, HasSubstr("expected at most 8 dimensions, got 9")));
  EXPECT_THAT(WithField("shape", json::array({2, 4})),
              StatusIs(kInvalid, HasSubstr("expected 32 bytes for F32 [2, 4], got 24")));
  json header = {{"w", {{"dtype", "F32"}, {"data_offsets", {0, 24}}}}};
  EXPECT_THAT(ParseHeader(header, std::string(24, 'x')),
              StatusIs(kInvalid, HasSubstr("shape: expected an array")));
}

TEST(SafetensorsTest, RefusesLyingOffsets) {
  EXPECT_THAT(WithField("data_offsets", json::array({0})),
              StatusIs(kInvalid, HasSubstr("data_offsets: expected [begin, end]")));
  EXPECT_THAT(WithField("data_offsets", "0,24"),
              StatusIs(kInvalid, HasSubstr("data_offsets: expected [begin, end]")));
  EXPECT_THAT(WithField("data_offsets", json::array({24, 0})),
              StatusIs(kInvalid, HasSubstr("data_offsets: expected 0 <= begin <= end")));
  EXPECT_THAT(WithField("data_offsets", json::array({-24, 0})),
              StatusIs(kInvalid, HasSubstr("data_offsets: expected 0 <= begin <= end")));
  EXPECT_THAT(WithField("data_offsets", json::array({0, 18446744073709551615u})),
              StatusIs(kInvalid, HasSubstr("data_offsets: expected 0 <= begin <= end")));
  EXPECT_THAT(WithField("data_offsets", json::array({0, 23})),
              StatusIs(kInvalid, HasSubstr("expected 24 bytes for F32 [2, 3], got 23")));
  EXPECT_THAT(
      WithField("data_offsets", json::array({9223372036854775783, 9223372036854775807})),
      StatusIs(kInvalid, HasSubstr("truncated: its data ends at byte 9223372036854775807")));
}

TEST(SafetensorsTest, RefusesOverlapsHolesAndTrailingBytes) {
  const auto two = [](int64_t begin, int64_t end, const std::string& data) {
    return ParseHeader(
        {{"a", {{"dtype", "U8"}, {"shape", {4}}, {"data_offsets", {0, 4}}}},
         {"b", {{"dtype", "U8"}, {"shape", {end - begin}}, {"data_offsets", {begin, end}}}}},
        data);
  };
  EXPECT_THAT(two(4, 8, "aaaabbbb"), IsOk());
  EXPECT_THAT(
      two(3, 7, "aaabbbb"),
      StatusIs(kInvalid, AllOf(HasSubstr("tensor \"b\""), HasSubstr("begins at 3, overlapping "
                                                                    "the tensor that ends at 4"))));
  EXPECT_THAT(
      two(5, 8, "aaaa.bbb"),
      StatusIs(kInvalid, HasSubstr("begins at 5, leaving a hole after the tensor that ends")));
  EXPECT_THAT(
      two(4, 8, "aaaabbbbc"),
      StatusIs(kInvalid, HasSubstr("oversized: the tensors take 8 bytes of data, the file has 9")));
  EXPECT_THAT(two(4, 8, "aaaabbb"),
              StatusIs(kInvalid, AllOf(HasSubstr("tensor \"b\": truncated"), HasSubstr("only 7"))));
  EXPECT_THAT(Parse(RawSafetensors("{}", "x")), StatusIs(kInvalid, HasSubstr("oversized")));
}

TEST(SafetensorsTest, CutsAndEscapesNamesInMessages) {
  const std::string name = "a\n\"\x1b" + std::string(5000, 'b');
  const absl::Status status = ParseHeader({{name, 1}}, "").status();
  EXPECT_THAT(status, StatusIs(kInvalid, HasSubstr(R"(tensor "a\n\"\033bbb)")));
  EXPECT_LT(status.message().size(), 300u);
}

}  // namespace
}  // namespace mmfree
