#include "server/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "nlohmann/json.hpp"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using nlohmann::json;
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kUnsupported = absl::StatusCode::kUnimplemented;

json Minimal() {
  return {{"model_type", "hgrn_bit"},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"num_hidden_layers", 2},
          {"intermediate_size", 128}};
}

absl::StatusOr<ModelConfig> Parse(const json& root) {
  return ModelConfig::FromJson(root.dump(), "dir/config.json");
}

absl::StatusOr<ModelConfig> With(const std::string& key, const json& value) {
  json root = Minimal();
  root[key] = value;
  return Parse(root);
}

TEST(ConfigTest, ReadsTheDemoModelsFile) {
  const std::string path = MMFREE_SOURCE_DIR "/deploy/models/tales/config.json";
  const absl::StatusOr<ModelConfig> config = ModelConfig::FromJson(ReadFile(path), path);
  ASSERT_THAT(config, IsOk());
  EXPECT_EQ(*config, *ConfigForShape("tales"));
}

TEST(ConfigTest, AbsentAndNullKeysTakeTheReferencesDefaults) {
  json root = Minimal();
  for (const char* const key : {"use_lower_bound", "bos_token_id", "eos_token_id", "rms_norm_eps",
                                "hidden_act", "use_short_conv", "attn_mode"}) {
    root[key] = nullptr;
  }
  const absl::StatusOr<ModelConfig> nulls = Parse(root);
  const absl::StatusOr<ModelConfig> absent = Parse(Minimal());
  ASSERT_THAT(nulls, IsOk());
  ASSERT_THAT(absent, IsOk());
  EXPECT_EQ(*nulls, *absent);
  EXPECT_TRUE(absent->use_lower_bound);
  EXPECT_EQ(absent->bos_token_id, 1);
  EXPECT_EQ(absent->eos_token_id, 2);
  EXPECT_EQ(absent->rms_norm_eps, 1e-6f);
}

TEST(ConfigTest, DerivesTheIntermediateSizeAsTheReferenceDoes) {
  struct Case {
    int64_t hidden;
    json ratio;
    int64_t expected;
  };
  // 256 * ceil(int(hidden * ratio * 2 / 3) / 256), computed with Python.
  const Case cases[] = {{1024, nullptr, 2816}, {2048, 4, 5632}, {2560, 4, 6912},
                        {5120, 4, 13824},      {512, 4, 1536},  {1000, 2.5, 1792}};
  for (const Case& c : cases) {
    json root = Minimal();
    root["hidden_size"] = c.hidden;
    root["hidden_ratio"] = c.ratio;
    root["intermediate_size"] = nullptr;
    const absl::StatusOr<ModelConfig> config = Parse(root);
    ASSERT_THAT(config, IsOk());
    EXPECT_EQ(config->intermediate_size, c.expected) << c.hidden;
  }
}

TEST(ConfigTest, NamesAMissingKey) {
  for (const char* const key : {"model_type", "vocab_size", "hidden_size", "num_hidden_layers"}) {
    json root = Minimal();
    root.erase(key);
    EXPECT_THAT(Parse(root), StatusIs(kInvalid, HasSubstr(std::string("dir/config.json: ") + key +
                                                          " is missing")));
  }
}

TEST(ConfigTest, NamesAWrongValueAndWhatWasExpected) {
  EXPECT_THAT(With("model_type", "llama"),
              StatusIs(kInvalid, HasSubstr("model_type: expected \"hgrn_bit\", got \"llama\"")));
  EXPECT_THAT(With("vocab_size", "many"),
              StatusIs(kInvalid, HasSubstr("vocab_size: expected an integer, got \"many\"")));
  EXPECT_THAT(With("vocab_size", 1.5),
              StatusIs(kInvalid, HasSubstr("vocab_size: expected an integer, got 1.5")));
  EXPECT_THAT(
      With("vocab_size", 0),
      StatusIs(kInvalid, HasSubstr("vocab_size: expected a value in [1, 16777216], got 0")));
  EXPECT_THAT(
      With("hidden_size", -64),
      StatusIs(kInvalid, HasSubstr("hidden_size: expected a value in [1, 65536], got -64")));
  EXPECT_THAT(With("hidden_size", 65537), StatusIs(kInvalid, HasSubstr("hidden_size: expected")));
  EXPECT_THAT(With("hidden_size", std::numeric_limits<uint64_t>::max()),
              StatusIs(kInvalid, HasSubstr("hidden_size: expected an integer")));
  EXPECT_THAT(With("intermediate_size", 131073),
              StatusIs(kInvalid, HasSubstr("intermediate_size: expected")));
  EXPECT_THAT(With("num_hidden_layers", 100000),
              StatusIs(kInvalid, HasSubstr("num_hidden_layers: expected a value in [1, 1024]")));
  EXPECT_THAT(With("bos_token_id", 100),
              StatusIs(kInvalid, HasSubstr("bos_token_id: expected a value in [0, 99], got 100")));
  EXPECT_THAT(With("eos_token_id", -1),
              StatusIs(kInvalid, HasSubstr("eos_token_id: expected a token id, got -1")));
  EXPECT_THAT(With("use_lower_bound", 1),
              StatusIs(kInvalid, HasSubstr("use_lower_bound: expected true or false, got 1")));
  EXPECT_THAT(With("rms_norm_eps", "small"),
              StatusIs(kInvalid, HasSubstr("rms_norm_eps: expected a number")));
  EXPECT_THAT(With("use_short_conv", "no"),
              StatusIs(kInvalid, HasSubstr("use_short_conv: expected a boolean")));
  json root = Minimal();
  root["intermediate_size"] = nullptr;
  root["hidden_ratio"] = -4;
  EXPECT_THAT(Parse(root), StatusIs(kInvalid, HasSubstr("hidden_ratio: expected a ratio")));
}

TEST(ConfigTest, RefusesUnsupportedVariantsByName) {
  EXPECT_THAT(
      With("use_short_conv", true),
      StatusIs(kUnsupported, HasSubstr("use_short_conv true is not supported, only false")));
  EXPECT_THAT(
      With("hidden_act", "gelu"),
      StatusIs(kUnsupported, HasSubstr("hidden_act \"gelu\" is not supported, only \"swish\"")));
  EXPECT_THAT(With("expand_ratio", 2), StatusIs(kUnsupported, HasSubstr("expand_ratio 2")));
  EXPECT_THAT(With("num_heads", 4), StatusIs(kUnsupported, HasSubstr("num_heads 4")));
  EXPECT_THAT(With("tie_word_embeddings", true),
              StatusIs(kUnsupported, HasSubstr("tie_word_embeddings true")));
  EXPECT_THAT(With("quantization_config", json::object()),
              StatusIs(kUnsupported, HasSubstr("quantization_config")));
  EXPECT_THAT(With("attn_mode", "parallel"),
              StatusIs(kUnsupported, HasSubstr("attn_mode \"parallel\"")));
  EXPECT_THAT(With("eos_token_id", json::array({2, 3})),
              StatusIs(kUnsupported, HasSubstr("eos_token_id [2,3]")));
  EXPECT_THAT(With("rms_norm_eps", 1e-5),
              StatusIs(kUnsupported, HasSubstr("rms_norm_eps 1e-05 is not supported")));
}

TEST(ConfigTest, RefusesWhatIsNotAJsonObject) {
  const auto parse = [](absl::string_view text) { return ModelConfig::FromJson(text, "c.json"); };
  EXPECT_THAT(parse(""), StatusIs(kInvalid, HasSubstr("c.json: is not valid JSON")));
  EXPECT_THAT(parse("{\"a\": 1"), StatusIs(kInvalid, HasSubstr("is not valid JSON at byte")));
  EXPECT_THAT(parse("{\"a\": 1e999}"), StatusIs(kInvalid, HasSubstr("is not valid JSON")));
  EXPECT_THAT(parse("{\"a\": \"\xff\"}"), StatusIs(kInvalid, HasSubstr("is not valid JSON")));
  EXPECT_THAT(parse("[1, 2]"), StatusIs(kInvalid, HasSubstr("expected a JSON object, got array")));
  EXPECT_THAT(parse("{\"vocab_size\": 1, \"vocab_size\": 2}"),
              StatusIs(kInvalid, HasSubstr("\"vocab_size\" appears twice")));
  const std::string deep(100000, '[');
  EXPECT_THAT(parse("{\"a\":" + deep), StatusIs(kInvalid, HasSubstr("nested deeper than 16")));
  EXPECT_THAT(parse(std::string(2 << 20, ' ')), StatusIs(kInvalid, HasSubstr("bytes of JSON")));
}

TEST(ConfigTest, WhatToJsonWritesIsReadBackTheSame) {
  for (const char* shape : {"tales", "370m", "13b"}) {
    ModelConfig config = *ConfigForShape(shape);
    config.use_lower_bound = false;
    config.eos_token_id = 7;
    const absl::StatusOr<ModelConfig> read = ModelConfig::FromJson(config.ToJson(), "config.json");
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, config);
  }
}

TEST(ConfigTest, NamedShapesAreValidAndOthersAreRefused) {
  for (const char* const shape : {"tales", "370m", "1.3b", "2.7b", "13b"}) {
    const absl::StatusOr<ModelConfig> config = ConfigForShape(shape);
    ASSERT_THAT(config, IsOk());
    EXPECT_THAT(config->Validate(shape), IsOk());
  }
  EXPECT_EQ(ConfigForShape("2.7b")->state_floats(), 32 * 2560);
  EXPECT_THAT(ConfigForShape("7b"), StatusIs(kInvalid, HasSubstr("unknown shape \"7b\"")));
}

}  // namespace
}  // namespace mmfree
