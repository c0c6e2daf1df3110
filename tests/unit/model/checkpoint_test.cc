#include "server/model/checkpoint.h"

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
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

std::string OneTensor(const std::string& name, const std::string& bytes) {
  SafetensorsWriter writer;
  writer.Add(name, "U8", {static_cast<int64_t>(bytes.size())}, bytes);
  return writer.Finish();
}

class CheckpointTest : public testing::Test {
 protected:
  absl::StatusOr<Checkpoint> WithMap(const json& map) {
    WriteFile(directory_.File(kIndexFile), json({{"weight_map", map}}).dump());
    return Checkpoint::Open(directory_.path());
  }

  const TempDirectory directory_;
};

TEST_F(CheckpointTest, ReadsShardsThroughTheIndex) {
  WriteFile(directory_.File("one.safetensors"), OneTensor("a", "AAA"));
  WriteFile(directory_.File("two.safetensors"), OneTensor("b", "BB"));
  absl::StatusOr<Checkpoint> opened = WithMap({{"a", "one.safetensors"}, {"b", "two.safetensors"}});
  ASSERT_THAT(opened, IsOk());
  Checkpoint checkpoint = *std::move(opened);
  EXPECT_EQ(checkpoint.single_file(), nullptr);
  ASSERT_NE(checkpoint.Find("b"), nullptr);
  EXPECT_EQ(checkpoint.Find("b")->tensor->bytes, 2);
  EXPECT_EQ(*checkpoint.Find("b")->source, directory_.File("two.safetensors"));
  EXPECT_EQ(checkpoint.Find("c"), nullptr);
}

TEST_F(CheckpointTest, PrefersTheSingleFile) {
  WriteFile(directory_.File(kWeightsFile), OneTensor("a", "AAA"));
  WriteFile(directory_.File(kIndexFile), "not even JSON");
  absl::StatusOr<Checkpoint> opened = Checkpoint::Open(directory_.path());
  ASSERT_THAT(opened, IsOk());
  EXPECT_NE(opened->single_file(), nullptr);
  EXPECT_EQ(opened->source(), directory_.File(kWeightsFile));
}

TEST_F(CheckpointTest, NamesWhatIsMissing) {
  EXPECT_THAT(
      Checkpoint::Open(directory_.path()),
      StatusIs(absl::StatusCode::kNotFound,
               HasSubstr("has neither model.safetensors nor model.safetensors.index.json")));
  EXPECT_THAT(WithMap({{"a", "gone.safetensors"}}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("gone.safetensors")));
}

TEST_F(CheckpointTest, RefusesAnIndexThatDoesNotFit) {
  WriteFile(directory_.File("one.safetensors"), OneTensor("a", "AAA"));
  EXPECT_THAT(WithMap({{"b", "one.safetensors"}}),
              StatusIs(kInvalid, HasSubstr("one.safetensors: tensor \"b\" is missing, but "
                                           "model.safetensors.index.json says it is there")));
  WriteFile(directory_.File(kIndexFile), "{}");
  EXPECT_THAT(Checkpoint::Open(directory_.path()),
              StatusIs(kInvalid, HasSubstr("weight_map: expected an object")));
  WriteFile(directory_.File(kIndexFile), "{\"weight_map\": ");
  EXPECT_THAT(Checkpoint::Open(directory_.path()),
              StatusIs(kInvalid, HasSubstr("index.json: is not valid JSON")));
  WriteFile(directory_.File("bad.safetensors"), "short");
  EXPECT_THAT(WithMap({{"a", "bad.safetensors"}}),
              StatusIs(kInvalid, HasSubstr("bad.safetensors: truncated")));
}

TEST_F(CheckpointTest, AShardMustLieInTheDirectory) {
  WriteFile(directory_.File("one.safetensors"), OneTensor("a", "AAA"));
  for (const json& name : {json("../one.safetensors"), json(directory_.File("one.safetensors")),
                           json("./one.safetensors"), json(".."), json("."), json(""),
                           json(std::string("one.safetensors\0x", 17)), json(7), json(nullptr)}) {
    EXPECT_THAT(
        WithMap({{"a", name}}),
        StatusIs(kInvalid, HasSubstr("tensor \"a\": expected the name of a file beside it")))
        << name;
  }
}

}  // namespace
}  // namespace mmfree
