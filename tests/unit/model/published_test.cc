// Published checkpoints: the formulas of the quantiser, and every way a checkpoint can be wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/model/model.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"
#include "tests/support/tiny_checkpoint.h"

namespace mmfree {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kUnsupported = absl::StatusCode::kUnimplemented;

std::shared_ptr<const Model> LoadOrDie(const TempDirectory& directory,
                                       const LoadOptions& options = {}) {
  absl::StatusOr<std::shared_ptr<const Model>> model = Model::Load(directory.path(), options);
  EXPECT_THAT(model, IsOk());
  return model.ok() ? *std::move(model) : nullptr;
}

// The quantiser's formulas, written again in the plainest way.
void ExpectTernary(const TernaryMatrix& matrix, const TinyTensor& dense, const std::string& name) {
  ASSERT_EQ((std::vector<int64_t>{matrix.rows, matrix.cols}), dense.shape) << name;
  double sum = 0.0;  // exact: multiples of 1/64
  for (const float w : dense.values) sum += std::fabs(static_cast<double>(w));
  const float scale = static_cast<float>(sum / static_cast<double>(dense.values.size()));
  EXPECT_EQ(matrix.scale, scale) << name;
  for (int64_t r = 0; r < matrix.rows; ++r) {
    for (int64_t k = 0; k < matrix.cols; ++k) {
      const float rounded = std::nearbyint(dense.values[r * matrix.cols + k] / scale);
      ASSERT_EQ(matrix.Weight(r, k), std::min(1.0f, std::max(-1.0f, rounded)))
          << name << " " << r << "," << k;
    }
  }
}

void ExpectVector(absl::Span<const float> vector, const TinyTensor& dense) {
  EXPECT_EQ(std::vector<float>(vector.begin(), vector.end()), dense.values);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(vector.data()) % 64, 0u);
}

TEST(PublishedTest, EveryTensorArrivesWhereItBelongs) {
  TinyCheckpoint tiny(TinyCheckpoint::OddConfig());
  const TempDirectory directory;
  tiny.Write(directory, "F16", 3);
  const auto model = LoadOrDie(directory);
  ASSERT_NE(model, nullptr);
  EXPECT_FALSE(model->packed());
  EXPECT_EQ(model->config(), tiny.config());
  auto& tensors = tiny.tensors();
  for (int64_t n = 0; n < 3; ++n) {
    const std::string prefix = "model.layers." + std::to_string(n) + ".";
    const LayerWeights& layer = model->layers()[n];
    ExpectTernary(layer.i, tensors[prefix + "attn.i_proj.weight"], "i");
    ExpectTernary(layer.f, tensors[prefix + "attn.f_proj.weight"], "f");
    ExpectTernary(layer.g, tensors[prefix + "attn.g_proj.weight"], "g");
    ExpectTernary(layer.o, tensors[prefix + "attn.o_proj.weight"], "o");
    ExpectTernary(layer.gate, tensors[prefix + "mlp.gate_proj.weight"], "gate");
    ExpectTernary(layer.down, tensors[prefix + "mlp.down_proj.weight"], "down");
    ExpectVector(layer.attn_norm, tensors[prefix + "attn_norm.weight"]);
    ExpectVector(layer.i_norm, tensors[prefix + "attn.i_proj.norm.weight"]);
    ExpectVector(layer.f_norm, tensors[prefix + "attn.f_proj.norm.weight"]);
    ExpectVector(layer.g_norm_in, tensors[prefix + "attn.g_proj.norm.weight"]);
    ExpectVector(layer.g_norm, tensors[prefix + "attn.g_norm.weight"]);
    ExpectVector(layer.o_norm, tensors[prefix + "attn.o_proj.norm.weight"]);
    ExpectVector(layer.mlp_norm, tensors[prefix + "mlp_norm.weight"]);
    ExpectVector(layer.gate_norm, tensors[prefix + "mlp.gate_proj.norm.weight"]);
    ExpectVector(layer.down_norm, tensors[prefix + "mlp.down_proj.norm.weight"]);
  }
  ExpectTernary(model->lm_head(), tensors["lm_head.weight"], "lm_head");
  ExpectVector(model->lm_head_norm(), tensors["lm_head.norm.weight"]);
  ExpectVector(model->final_norm(), tensors["model.norm.weight"]);
  const TinyTensor& embedding = tensors["model.embeddings.weight"];
  EXPECT_EQ(model->embedding().dtype, DType::kF16);
  const std::string bytes = TinyCheckpoint::Encode("F16", embedding.values);
  EXPECT_EQ(memcmp(model->embedding().data, bytes.data(), bytes.size()), 0);
}

TEST(PublishedTest, LowerBoundsAreTheCumulatedSoftmaxWithoutItsFirstRow) {
  TinyCheckpoint tiny(TinyCheckpoint::OddConfig());
  const TempDirectory directory;
  tiny.Write(directory, "F32");
  const auto model = LoadOrDie(directory);
  ASSERT_NE(model, nullptr);
  const std::vector<float>& x = tiny.tensors()["model.lower_bounds"].values;
  const int64_t d = tiny.config().hidden_size;
  for (int64_t k = 0; k < d; ++k) {
    double sum = 0.0;
    for (int64_t n = 0; n < 3; ++n) sum += std::exp(x[n * d + k]);
    double cumulated = 0.0;
    for (int64_t n = 0; n < 3; ++n) {
      if (n > 0) cumulated += std::exp(x[n * d + k]) / sum;
      EXPECT_NEAR(model->layers()[n].lower_bound[k], cumulated, 1e-6);
    }
    EXPECT_EQ(model->layers()[0].lower_bound[k], 0.0f);
  }
}

TEST(PublishedTest, WithoutLowerBoundsTheyAreZeroAndTheTensorIsNotNeeded) {
  ModelConfig config = TinyCheckpoint::OddConfig();
  config.use_lower_bound = false;
  const TinyCheckpoint tiny(config);
  const TempDirectory directory;
  tiny.Write(directory, "F32");
  const auto model = LoadOrDie(directory);
  ASSERT_NE(model, nullptr);
  for (const LayerWeights& layer : model->layers()) {
    for (const float bound : layer.lower_bound) EXPECT_EQ(bound, 0.0f);
  }
}

TEST(PublishedTest, DtypeShardsAndThreadsDoNotChangeCodesOrScales) {
  const TinyCheckpoint tiny(TinyCheckpoint::OddConfig());
  std::shared_ptr<const Model> first;
  for (const char* const dtype : {"F32", "F16", "BF16"}) {
    std::string digest;
    for (const int shards : {1, 4}) {
      for (const int threads : {1, 2, 5}) {
        const TempDirectory directory;
        tiny.Write(directory, dtype, shards);
        LoadOptions options;
        options.threads = threads;
        const auto model = LoadOrDie(directory, options);
        ASSERT_NE(model, nullptr);
        if (digest.empty()) digest = model->digest();
        EXPECT_EQ(model->digest(), digest) << dtype << " " << shards << " " << threads;
        if (first == nullptr) first = model;
        const TernaryMatrix& a = first->layers()[2].down;
        const TernaryMatrix& b = model->layers()[2].down;
        EXPECT_EQ(a.scale, b.scale);
        EXPECT_EQ(memcmp(a.codes, b.codes, static_cast<size_t>(a.bytes())), 0);
      }
    }
  }
}

// Bytes of files that are mapped and resident in this process.
int64_t ResidentFileBytes() {
  std::ifstream file("/proc/self/status");
  for (std::string word; file >> word;) {
    int64_t kib = 0;
    if (word == "RssFile:" && file >> kib) return kib * 1024;
  }
  return -1;
}

TEST(PublishedTest, WhatHasBeenPackedDoesNotStayInMemory) {
  ModelConfig config = TinyCheckpoint::OddConfig();
  // Matrices large enough for the whole pages of neighbours, which may be huge, to count little.
  config.hidden_size = 1024;
  config.intermediate_size = 4096;
  config.num_layers = 1;
  const TinyCheckpoint tiny(config);
  const TempDirectory directory;
  tiny.Write(directory, "F32");
  const int64_t before = ResidentFileBytes();
  ASSERT_GT(before, 0);
  int64_t total_bytes = 0;
  int64_t resident = 0;
  LoadOptions options;
  options.progress = [&](int64_t done, int64_t total) {
    if (done < total) return;
    total_bytes = total;
    resident = ResidentFileBytes();  // the checkpoint is still mapped
  };
  ASSERT_NE(LoadOrDie(directory, options), nullptr);
  ASSERT_GT(total_bytes, 60 << 20);
  EXPECT_LT(resident - before, total_bytes / 2);
}

TEST(PublishedTest, TheDigestChangesWithEveryTensorAndEveryNumberOfTheConfig) {
  TinyCheckpoint tiny(TinyCheckpoint::OddConfig());
  const auto digest = [&] {
    const TempDirectory directory;
    tiny.Write(directory, "F32");
    const auto model = LoadOrDie(directory);
    return model == nullptr ? std::string() : model->digest();
  };
  const std::string original = digest();
  EXPECT_EQ(original.size(), 64u);
  EXPECT_EQ(digest(), original);
  for (auto& [name, tensor] : tiny.tensors()) {
    const float saved = tensor.values.back();
    tensor.values.back() = saved > 0.0f ? -saved - 1.0f : 1.0f - saved;
    EXPECT_NE(digest(), original) << name;
    tensor.values.back() = saved;
  }
  for (const char* const key : {"bos_token_id", "eos_token_id"}) {
    const int64_t saved = tiny.json()[key];
    tiny.json()[key] = saved + 5;
    EXPECT_NE(digest(), original) << key;
    tiny.json()[key] = saved;
  }
  tiny.json()["use_lower_bound"] = false;
  EXPECT_NE(digest(), original);
  tiny.json()["use_lower_bound"] = true;
  tiny.json()["initializer_range"] = 0.5;
  EXPECT_EQ(digest(), original) << "a number that changes no result";
}

TEST(PublishedTest, ProgressRisesToTheEnd) {
  const TinyCheckpoint tiny(TinyCheckpoint::OddConfig());
  const TempDirectory directory;
  tiny.Write(directory, "F16");
  std::vector<std::pair<int64_t, int64_t>> calls;
  ASSERT_THAT(Model::Load(directory.path(),
                          [&](int64_t done, int64_t total) { calls.emplace_back(done, total); }),
              IsOk());
  ASSERT_FALSE(calls.empty());
  EXPECT_EQ(calls.back().first, calls.back().second);
  for (size_t k = 1; k < calls.size(); ++k) {
    EXPECT_LE(calls[k - 1].first, calls[k].first);
    EXPECT_EQ(calls[k - 1].second, calls[k].second);
  }
}

class BadPublishedTest : public testing::Test {
 protected:
  absl::Status Load() {
    tiny_.Write(directory_, "F16", 2);
    return Model::Load(directory_.path()).status();
  }

  TinyCheckpoint tiny_{TinyCheckpoint::OddConfig()};
  const TempDirectory directory_;
};

TEST_F(BadPublishedTest, MissingDirectoryAndFiles) {
  EXPECT_THAT(Model::Load(directory_.File("none")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none: no such model directory")));
  EXPECT_THAT(Model::Load(directory_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("config.json")));
  WriteFile(directory_.File("config.json"), tiny_.json().dump());
  EXPECT_THAT(Model::Load(directory_.path()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("has neither model.safetensors")));
  EXPECT_THAT(Model::Load(directory_.File("config.json")),
              StatusIs(kInvalid, HasSubstr("config.json: not a directory")));
}

TEST_F(BadPublishedTest, ConfigErrorsNameTheFile) {
  tiny_.json()["use_short_conv"] = true;
  EXPECT_THAT(Load(), StatusIs(kUnsupported, AllOf(HasSubstr(directory_.File("config.json")),
                                                   HasSubstr("use_short_conv true"))));
}

TEST_F(BadPublishedTest, EveryMissingTensorIsNamed) {
  const auto all = tiny_.tensors();
  for (const auto& [name, tensor] : all) {
    tiny_.tensors().erase(name);
    EXPECT_THAT(Load(), StatusIs(kInvalid, HasSubstr("tensor \"" + name + "\" is missing")));
    tiny_.tensors()[name] = tensor;
  }
}

TEST_F(BadPublishedTest, EveryWrongShapeIsNamedWithWhatWasExpected) {
  const auto all = tiny_.tensors();
  for (const auto& [name, tensor] : all) {
    TinyTensor& wrong = tiny_.tensors()[name];
    wrong.shape.back() -= 1;
    wrong.values.resize(wrong.values.size() / (wrong.shape.back() + 1) * wrong.shape.back());
    EXPECT_THAT(Load(),
                StatusIs(kInvalid, AllOf(HasSubstr("tensor \"" + name + "\": shape: expected"),
                                         HasSubstr(".safetensors"))));
    tiny_.tensors()[name] = tensor;
  }
  // The right number of elements in another shape is as wrong.
  TinyTensor& flat = tiny_.tensors()["lm_head.weight"];
  flat.shape = {int64_t{37} * 20};
  EXPECT_THAT(Load(), StatusIs(kInvalid, HasSubstr("shape: expected [37, 20], got [740]")));
}

TEST_F(BadPublishedTest, EveryInfiniteOrNaNWeightIsNamed) {
  for (auto& [name, tensor] : tiny_.tensors()) {
    const float saved = tensor.values.back();
    for (const float bad :
         {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      tensor.values.back() = bad;
      EXPECT_THAT(Load(), StatusIs(kInvalid, HasSubstr("tensor \"" + name +
                                                       "\": has a value that is infinite or NaN")));
    }
    tensor.values.back() = saved;
  }
}

TEST_F(BadPublishedTest, TensorsOfAnotherModelAreNotIgnored) {
  tiny_.tensors()["model.layers.0.attn.i_proj.bias"] = {{20}, std::vector<float>(20, 0.5f)};
  EXPECT_THAT(Load(), StatusIs(kUnsupported,
                               HasSubstr("tensor \"model.layers.0.attn.i_proj.bias\": not part of "
                                         "the supported model with 3 layers")));
  tiny_.tensors().erase("model.layers.0.attn.i_proj.bias");
  tiny_.json()["num_hidden_layers"] = 2;
  EXPECT_THAT(Load(),
              StatusIs(kInvalid, HasSubstr("\"model.lower_bounds\": shape: expected [2, 20]")));
  tiny_.json()["num_hidden_layers"] = 4;
  EXPECT_THAT(Load(),
              StatusIs(kInvalid, HasSubstr("\"model.lower_bounds\": shape: expected [4, 20]")));
}

TEST_F(BadPublishedTest, TheVariantWithoutNormsIsRefusedByName) {
  std::vector<std::string> norms;
  for (const auto& [name, tensor] : tiny_.tensors()) {
    if (name.find("_proj.norm.weight") != std::string::npos) norms.push_back(name);
  }
  for (const std::string& name : norms) tiny_.tensors().erase(name);
  EXPECT_THAT(Load(), StatusIs(kUnsupported, HasSubstr("the variant without norms")));
}

TEST_F(BadPublishedTest, IntegerWeightsAreRefused) {
  SafetensorsWriter writer;
  writer.Add("model.embeddings.weight", "I32", {37, 20}, std::string(size_t{37} * 20 * 4, '\1'));
  WriteFile(directory_.File("config.json"), tiny_.json().dump());
  WriteFile(directory_.File("model.safetensors"), writer.Finish());
  EXPECT_THAT(
      Model::Load(directory_.path()),
      StatusIs(kInvalid, HasSubstr("tensor \"model.embeddings.weight\": dtype: expected F32, "
                                   "F16 or BF16, got I32")));
}

TEST_F(BadPublishedTest, AConfigThatLiesAboutSizesAllocatesNothing) {
  tiny_.json()["vocab_size"] = 1 << 24;
  tiny_.json()["hidden_size"] = 65536;
  tiny_.json()["num_hidden_layers"] = 1024;
  tiny_.json()["intermediate_size"] = 131072;
  EXPECT_THAT(Load(), StatusIs(kInvalid, HasSubstr("shape: expected [16777216, 65536]")));
}

}  // namespace
}  // namespace mmfree
