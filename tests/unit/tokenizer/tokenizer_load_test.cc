#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/tokenizer/sentencepiece_model.h"
#include "server/tokenizer/tokenizer.h"
#include "server/tokenizer/tokenizer_config.h"
#include "tests/unit/tokenizer/test_models.h"

namespace mmfree {
namespace {

using ::absl::StatusCode;
using ::testing::AllOf;
using ::testing::HasSubstr;

void ExpectError(const absl::Status& status, StatusCode code, const std::string& file,
                 const std::string& what) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(file), HasSubstr(what)));
}

absl::Status LoadStatus(const TempDirectory& directory, int64_t vocab_size = kTalesVocabulary) {
  return Tokenizer::Load(directory.path(), vocab_size).status();
}

void ExpectModelError(const std::string& model, StatusCode code, const std::string& what) {
  TempDirectory directory;
  directory.Write("tokenizer.model", model);
  ExpectError(LoadStatus(directory, 1 << 20), code, directory.path() + "/tokenizer.model", what);
}

TEST(TokenizerLoadTest, MissingModelIsNotFound) {
  TempDirectory directory;
  ExpectError(LoadStatus(directory), StatusCode::kNotFound, directory.path() + "/tokenizer.model",
              "no such file");
  ExpectError(Tokenizer::Load("/nonexistent/folder", 10).status(), StatusCode::kNotFound,
              "/nonexistent/folder/tokenizer.model", "no such file");
}

TEST(TokenizerLoadTest, ADirectoryInPlaceOfTheFileIsRefused) {
  TempDirectory directory;
  std::filesystem::create_directory(directory.path() + "/tokenizer.model");
  ExpectError(LoadStatus(directory), StatusCode::kInvalidArgument, "/tokenizer.model",
              "not a regular file");
}

TEST(TokenizerLoadTest, AnotherFileIsRefused) {
  ExpectModelError("", StatusCode::kInvalidArgument, "it has no pieces");
  ExpectModelError("version https://git-lfs.github.com/spec/v1\n", StatusCode::kInvalidArgument,
                   "not a SentencePiece model: the file is damaged or cut short at its byte 0");
  ExpectModelError(R"({"model_type": "hgrn_bit"})", StatusCode::kInvalidArgument,
                   "not a SentencePiece model");
}

TEST(TokenizerLoadTest, EveryTruncationIsRefused) {
  const std::string model = TalesModel();
  const auto check = [&](size_t size) {
    const auto parsed = SentencePieceModel::Parse(absl::string_view(model).substr(0, size));
    ASSERT_EQ(parsed.status().code(), StatusCode::kInvalidArgument) << size;
  };
  for (size_t size = 0; size < model.size(); size += 61) check(size);
  for (size_t size = model.size() - 400; size < model.size(); ++size) check(size);
}

TEST(TokenizerLoadTest, DamagedModelsNeverCrash) {
  const std::string good = TalesModel();
  std::mt19937 random(11);
  int loaded = 0;
  for (int round = 0; round < 400; ++round) {
    std::string model = good;
    const size_t from = round % 2 ? 0 : model.size() - 200;  // the settings stand at the end
    for (int flips = 1 + round % 3; flips > 0; --flips) {
      model[from + random() % (model.size() - from)] ^= static_cast<char>(1 << random() % 8);
    }
    const auto parsed = SentencePieceModel::Parse(model);
    if (!parsed.ok()) continue;
    ++loaded;
    if (round % 8) continue;  // the whole way takes longer
    TempDirectory directory;
    directory.Write("tokenizer.model", model);
    const auto tokenizer = Tokenizer::Load(directory.path(), kTalesVocabulary);
    if (!tokenizer.ok()) continue;
    const auto ids = (*tokenizer)->Encode("Once upon a time 🐺", {});
    ASSERT_TRUE(ids.ok());
    EXPECT_TRUE((*tokenizer)->Decode(*ids, true).ok());
  }
  EXPECT_GT(loaded, 10);
  for (int round = 0; round < 2000; ++round) {
    std::string noise(random() % 100, '\0');
    for (char& c : noise) c = static_cast<char>(random());
    EXPECT_FALSE(SentencePieceModel::Parse(noise).ok());
  }
}

TEST(TokenizerLoadTest, BadPiecesAreNamed) {
  const std::string good = TalesModel();
  const StatusCode bad = StatusCode::kInvalidArgument;
  ExpectModelError(good + ExtraPiece("", 0), bad, "piece 4096 is empty");
  ExpectModelError(good + ExtraPiece("\xFF", 0), bad, "piece 4096 is not UTF-8");
  ExpectModelError(good + ExtraPiece("qq", std::numeric_limits<float>::quiet_NaN()), bad,
                   "piece 4096 has a score of NaN");
  ExpectModelError(good + ExtraPiece("qq", 0, 7), bad, "piece 4096 has the unknown type 7");
  ExpectModelError(good + ExtraPiece("▁the", 0), bad, "piece 4096 \"▁the\" stands there twice");
  ExpectModelError(good + ExtraPiece("0x0A", 0, 6), bad, "piece 4096 is a byte");
}

TEST(TokenizerLoadTest, UnsupportedKindsAreNamed) {
  const std::string good = TalesModel();
  const StatusCode unsupported = StatusCode::kUnimplemented;
  ExpectModelError(good + ExtraPiece("qq", 0, 4), unsupported, "\"qq\" is user-defined");
  ExpectModelError(good + ExtraPiece("qq", 0, 5), unsupported, "\"qq\" is unused");
  // Overrides of trainer_spec (field 2) and normalizer_spec (field 3).
  ExpectModelError(good + std::string("\x12\x02\x18\x01", 4), unsupported, "model_type 1");
  ExpectModelError(good + std::string("\x12\x03\xC0\x01\x01", 5), unsupported,
                   "treat_whitespace_as_suffix = true");
  ExpectModelError(good + std::string("\x12\x03\x98\x02\x00", 5), unsupported,
                   "byte_fallback = false");
  ExpectModelError(good + "\x1A\x08\x0A\x03nmt\x12\x01x", unsupported, "normalizer \"nmt\"");
  ExpectModelError(good + std::string("\x1A\x02\x28\x00", 4), unsupported,
                   "escape_whitespaces = false");
}

TEST(TokenizerLoadTest, MorePiecesThanTheModelHasIsRefusedFewerIsNot) {
  ExpectError(Tokenizer::Load(TalesDirectory(), kTalesVocabulary - 1).status(),
              StatusCode::kInvalidArgument, "tales/tokenizer.model",
              "4096 pieces, more than the model's vocabulary of 4095");
  EXPECT_TRUE(Tokenizer::Load(TalesDirectory(), kTalesVocabulary + 64).ok());
}

TEST(TokenizerConfigTest, DefaultsHoldForAbsentAndNullKeys) {
  for (const std::string json : {"{}", R"({"add_bos_token": null, "bos_token": null})"}) {
    const auto config = TokenizerConfig::FromJson(json);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_TRUE(config->add_bos_token);
    EXPECT_EQ(config->bos_token, "");
  }
}

TEST(TokenizerConfigTest, SpecialTokensMayBeObjects) {
  const auto config = TokenizerConfig::FromJson(
      R"({"add_bos_token": false, "bos_token": {"content": "<s>", "lstrip": false}})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->add_bos_token);
  EXPECT_EQ(config->bos_token, "<s>");
}

TEST(TokenizerConfigTest, ErrorsNameTheFileAndTheKey) {
  const struct {
    std::string json;
    StatusCode code;
    std::string what;
  } cases[] = {
      {"", StatusCode::kInvalidArgument, "not valid JSON"},
      {"{\"a\": \"\xFF\"}", StatusCode::kInvalidArgument, "not valid JSON"},
      {"[]", StatusCode::kInvalidArgument, "not a JSON object"},
      {R"({"add_bos_token": "yes"})", StatusCode::kInvalidArgument,
       "add_bos_token must be true or false, but is string"},
      {R"({"add_eos_token": 1})", StatusCode::kInvalidArgument,
       "add_eos_token must be true or false, but is number"},
      {R"({"add_eos_token": true})", StatusCode::kUnimplemented, "add_eos_token = true"},
      {R"({"add_prefix_space": false})", StatusCode::kUnimplemented, "add_prefix_space = false"},
      {R"({"tokenizer_class": "GPT2Tokenizer"})", StatusCode::kUnimplemented,
       "tokenizer_class \"GPT2Tokenizer\""},
      {R"({"tokenizer_class": {}})", StatusCode::kInvalidArgument,
       "tokenizer_class must be a string, but is object"},
      {R"({"bos_token": {"id": 1}})", StatusCode::kInvalidArgument,
       "bos_token.content must be a string"},
  };
  for (const auto& c : cases) {
    TempDirectory directory;
    directory.Write("tokenizer.model", TalesModel());
    directory.Write("tokenizer_config.json", c.json);
    ExpectError(LoadStatus(directory), c.code, directory.path() + "/tokenizer_config.json", c.what);
  }
}

TEST(TokenizerConfigTest, DeepNestingIsRefusedNotACrash) {
  const auto config = TokenizerConfig::FromJson(std::string(1 << 20, '['));
  EXPECT_EQ(config.status().code(), StatusCode::kInvalidArgument);
}

TEST(TokenizerLoadTest, SpecialTokensMustBeTheModels) {
  TempDirectory directory;
  directory.Write("tokenizer.model", TalesModel());
  directory.Write("tokenizer_config.json", R"({"eos_token": "<|endoftext|>"})");
  ExpectError(LoadStatus(directory), StatusCode::kInvalidArgument, "/tokenizer.model",
              "its eos_token is \"</s>\", but tokenizer_config.json says \"<|endoftext|>\"");
}

TEST(TokenizerLoadTest, AddBosTokenIsObeyed) {
  TempDirectory directory;
  directory.Write("tokenizer.model", TalesModel());
  directory.Write("tokenizer_config.json", R"({"add_bos_token": false})");
  const auto tokenizer = Tokenizer::Load(directory.path(), kTalesVocabulary);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("the", {})->front(),
            (*tokenizer)->Encode("the", {.bos = false})->front());
}

}  // namespace
}  // namespace mmfree
