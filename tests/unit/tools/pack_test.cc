#include "server/tools/pack.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>

#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"
#include "tests/support/tiny_checkpoint.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

using testing::ElementsAre;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

std::vector<std::string> FilesIn(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

class PackTest : public testing::Test {
 protected:
  void SetUp() override {
    TinyCheckpoint(TinyCheckpoint::OddConfig()).Write(in_, "BF16", 2);
    options_.input = in_.path();
    options_.output = work_.File("out");
  }
  std::string Out(const std::string& name) const { return options_.output + "/" + name; }

  const TempDirectory in_;
  const TempDirectory work_;
  PackOptions options_;
};

TEST_F(PackTest, WritesAModelEqualToItsInputAndReportsIt) {
  WriteFile(in_.File("tokenizer_config.json"), "{}");
  const absl::StatusOr<PackReport> report = Pack(options_);
  ASSERT_THAT(report, IsOk());
  EXPECT_THAT(report->files, ElementsAre("tokenizer.model", "tokenizer_config.json", "config.json",
                                         "model.safetensors"));
  EXPECT_THAT(FilesIn(options_.output),
              UnorderedElementsAre("tokenizer.model", "tokenizer_config.json", "config.json",
                                   "model.safetensors"));
  int64_t bytes = 0;
  for (const std::string& name : report->files) {
    bytes += static_cast<int64_t>(fs::file_size(Out(name)));
    if (name == "model.safetensors") continue;
    EXPECT_EQ(ReadFile(Out(name)), ReadFile(in_.File(name)));
  }
  EXPECT_EQ(report->output_bytes, bytes);
  const auto from = Model::Load(in_.path());
  const auto to = Model::Load(options_.output);
  ASSERT_THAT(from, IsOk());
  ASSERT_THAT(to, IsOk());
  EXPECT_TRUE((*to)->packed());
  EXPECT_EQ((*to)->digest(), (*from)->digest());
  EXPECT_EQ(report->digest, (*from)->digest());
  EXPECT_EQ(report->parameters, (*from)->parameters());
  const absl::StatusOr<PackReport> verified = VerifyPacked(options_.output, 0, nullptr);
  ASSERT_THAT(verified, IsOk());
  EXPECT_EQ(verified->digest, report->digest);
}

TEST_F(PackTest, RunAgainItGivesTheSameBytesWhateverTheThreads) {
  ASSERT_THAT(Pack(options_), IsOk());
  const std::string first = ReadFile(Out("model.safetensors"));
  for (const int threads : {1, 2, 7}) {
    options_.threads = threads;
    ASSERT_THAT(Pack(options_), IsOk());
    EXPECT_EQ(ReadFile(Out("model.safetensors")), first);
  }
}

TEST_F(PackTest, APackedInputComesOutUnchanged) {
  ASSERT_THAT(Pack(options_), IsOk());
  PackOptions again;
  again.input = options_.output;
  again.output = work_.File("again");
  ASSERT_THAT(Pack(again), IsOk());
  for (const char* const name : {"model.safetensors", "config.json", "tokenizer.model"}) {
    EXPECT_EQ(ReadFile(work_.File("again/") + name), ReadFile(Out(name)));
  }
}

TEST_F(PackTest, ADamagedPackedInputIsRefusedAndNothingIsWritten) {
  ASSERT_THAT(Pack(options_), IsOk());
  std::string bytes = ReadFile(Out("model.safetensors"));
  bytes.back() ^= 1;
  WriteFile(Out("model.safetensors"), bytes);
  PackOptions again;
  again.input = options_.output;
  again.output = work_.File("again");
  EXPECT_THAT(Pack(again), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("damaged")));
  EXPECT_FALSE(fs::exists(again.output));
  EXPECT_THAT(VerifyPacked(options_.output, 0, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("damaged")));
}

TEST_F(PackTest, AnErrorOfTheInputLeavesTheOutputAlone) {
  ASSERT_THAT(Pack(options_), IsOk());
  const std::string before = ReadFile(Out("model.safetensors"));
  fs::remove(in_.File("tokenizer.model"));
  EXPECT_THAT(Pack(options_),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(in_.File("tokenizer.model"))));
  EXPECT_EQ(ReadFile(Out("model.safetensors")), before);
  EXPECT_EQ(ReadFile(Out("tokenizer.model")), "not a real tokenizer");
}

TEST_F(PackTest, ReplacesAPackedModelAndWhatBelongedToItButNothingElse) {
  WriteFile(in_.File("tokenizer_config.json"), "{\"old\": 1}");
  ASSERT_THAT(Pack(options_), IsOk());
  WriteFile(Out("README.md"), "mine");
  const auto mapped = Model::Load(options_.output);
  ASSERT_THAT(mapped, IsOk());
  const std::string old_digest = (*mapped)->digest();

  fs::remove(in_.File("tokenizer_config.json"));
  TinyCheckpoint(TinyCheckpoint::OddConfig(), /*seed=*/2).Write(in_, "BF16", 2);
  const absl::StatusOr<PackReport> report = Pack(options_);
  ASSERT_THAT(report, IsOk());
  EXPECT_NE(report->digest, old_digest);
  EXPECT_THAT(FilesIn(options_.output), UnorderedElementsAre("tokenizer.model", "config.json",
                                                             "model.safetensors", "README.md"));
  EXPECT_EQ(ReadFile(Out("README.md")), "mine");
  EXPECT_THAT(VerifyPacked(options_.output, 0, nullptr), IsOk());
}

TEST_F(PackTest, RefusesToWriteOverSomethingElseUnlessForced) {
  fs::create_directory(options_.output);
  ASSERT_THAT(Pack(options_), IsOk()) << "an empty directory is nobody's";
  fs::remove(Out("model.safetensors"));
  EXPECT_THAT(Pack(options_),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("not a packed model; --force")));
  TinyCheckpoint(TinyCheckpoint::OddConfig()).Write(in_, "F32");
  const std::string published = ReadFile(in_.File("model.safetensors"));
  WriteFile(Out("model.safetensors"), published);
  EXPECT_THAT(Pack(options_),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("not a packed model")));
  EXPECT_EQ(ReadFile(Out("model.safetensors")), published);
  options_.force = true;
  ASSERT_THAT(Pack(options_), IsOk());
  EXPECT_THAT(VerifyPacked(options_.output, 0, nullptr), IsOk());
}

TEST_F(PackTest, GoesOverWhatAKilledRunLeft) {
  fs::create_directory(options_.output);
  WriteFile(Out("config.json"), "{}");
  WriteFile(Out("model.safetensors.tmp-4711"), "half");
  ASSERT_THAT(Pack(options_), IsOk());
  EXPECT_THAT(FilesIn(options_.output),
              UnorderedElementsAre("tokenizer.model", "config.json", "model.safetensors"));

  // Names that only look like it are somebody's.
  for (const char* name : {"model.safetensors.tmp-", "model.safetensors.tmp-1a", "notes.tmp-1"}) {
    fs::remove_all(options_.output);
    fs::create_directory(options_.output);
    WriteFile(Out(name), "mine");
    EXPECT_THAT(Pack(options_), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("--force")));
    EXPECT_EQ(ReadFile(Out(name)), "mine");
  }
}

TEST_F(PackTest, RefusesOutputsThatCannotBe) {
  constexpr absl::StatusCode kFailed = absl::StatusCode::kFailedPrecondition;
  options_.force = true;
  options_.output = in_.path() + "/.";
  EXPECT_THAT(Pack(options_), StatusIs(kFailed, HasSubstr("the output is the input directory")));
  options_.output = work_.File("no/such/parent");
  EXPECT_THAT(Pack(options_), StatusIs(kFailed, HasSubstr("its parent directory does not exist")));
  options_.output = in_.File("config.json");
  EXPECT_THAT(Pack(options_), StatusIs(kFailed, HasSubstr("config.json: not a directory")));
  // A directory where a file should go: the rename fails and leaves no temporary file behind.
  options_.output = work_.File("out");
  fs::create_directories(Out("model.safetensors/x"));
  EXPECT_THAT(Pack(options_), StatusIs(kFailed, HasSubstr("cannot write")));
  EXPECT_THAT(FilesIn(options_.output),
              UnorderedElementsAre("tokenizer.model", "config.json", "model.safetensors"));
}

TEST_F(PackTest, RandomWeightsOfAShapeAreWrittenVerifiableAndRepeatable) {
  options_.random_shape = "tales";
  const absl::StatusOr<PackReport> report = Pack(options_);
  ASSERT_THAT(report, IsOk());
  EXPECT_THAT(VerifyPacked(options_.output, 0, nullptr), IsOk());
  const std::string weights = ReadFile(Out("model.safetensors"));
  ASSERT_THAT(Pack(options_), IsOk());
  EXPECT_TRUE(ReadFile(Out("model.safetensors")) == weights);

  const absl::StatusOr<std::shared_ptr<const Model>> model = Model::Load(options_.output);
  ASSERT_THAT(model, IsOk());
  const ModelConfig config = *ConfigForShape("tales");
  EXPECT_EQ((*model)->config(), config);
  EXPECT_EQ((*model)->digest(), report->digest);
  const std::shared_ptr<const Model> random = Model::Random(config, 1);
  const TernaryMatrix& written = (*model)->layers()[2].gate;
  const TernaryMatrix& made = random->layers()[2].gate;
  EXPECT_EQ(written.scale, made.scale);
  ASSERT_EQ(written.bytes(), made.bytes());
  EXPECT_EQ(memcmp(written.codes, made.codes, static_cast<size_t>(made.bytes())), 0);
}

TEST_F(PackTest, AnUnknownRandomShapeIsRefusedWithTheNames) {
  options_.random_shape = "7b";
  EXPECT_THAT(Pack(options_), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("370m")));
  EXPECT_FALSE(fs::exists(options_.output));
}

TEST_F(PackTest, OnlyAPackedModelCanBeVerified) {
  EXPECT_THAT(VerifyPacked(in_.path(), 0, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a published checkpoint")));
  EXPECT_THAT(VerifyPacked(work_.File("none"), 0, nullptr),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such model directory")));
}

TEST_F(PackTest, PackingThePublishedDemoModelGivesTheOneInTheRepository) {
  const char* const published = std::getenv("MMFREE_PUBLISHED_TALES");
  if (published == nullptr) {
    GTEST_SKIP() << "MMFREE_PUBLISHED_TALES does not name the published checkpoint";
  }
  options_.input = published;
  const absl::StatusOr<PackReport> report = Pack(options_);
  ASSERT_THAT(report, IsOk());
  const std::string demo = MMFREE_SOURCE_DIR "/deploy/models/tales/";
  for (const std::string& name : report->files) {
    EXPECT_TRUE(ReadFile(Out(name)) == ReadFile(demo + name)) << name << " differs";
  }
}

}  // namespace
}  // namespace mmfree
