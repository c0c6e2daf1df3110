#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "server/base/numerics.h"
#include "server/model/model.h"
#include "server/model/stored_model.h"
#include "tests/support/tiny_checkpoint.h"

namespace mmfree {
namespace {

bool Aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }

std::string Contents(const Model& model) {
  const auto& stored = dynamic_cast<const StoredModel&>(model);
  std::string bytes;
  for (size_t t = 0; t < stored.layout().tensors.size(); ++t) {
    bytes.append(reinterpret_cast<const char*>(stored.data(t)),
                 static_cast<size_t>(stored.layout().tensors[t].bytes));
  }
  return bytes;
}

TEST(RandomModelTest, SameSeedSameWeightsAnotherSeedOthers) {
  const ModelConfig config = TinyCheckpoint::OddConfig();
  const auto a = Model::Random(config, 5);
  const auto b = Model::Random(config, 5);
  const auto c = Model::Random(config, 6);
  EXPECT_EQ(Contents(*a), Contents(*b));
  EXPECT_EQ(a->digest(), b->digest());
  EXPECT_NE(Contents(*a), Contents(*c));
  EXPECT_NE(a->digest(), c->digest());
}

TEST(RandomModelTest, IsAValidModelOfTheShape) {
  for (const ModelConfig& config : {TinyCheckpoint::OddConfig(), *ConfigForShape("tales")}) {
    const auto model = Model::Random(config, 1);
    EXPECT_EQ(model->config(), config);
    ASSERT_EQ(static_cast<int64_t>(model->layers().size()), config.num_layers);
    for (int64_t n = 0; n < config.num_layers; ++n) {
      const LayerWeights& layer = model->layers()[n];
      EXPECT_EQ(layer.gate.rows, 2 * config.intermediate_size);
      EXPECT_EQ(layer.gate.cols, config.hidden_size);
      EXPECT_EQ(layer.down.rows, config.hidden_size);
      EXPECT_EQ(layer.down.cols, config.intermediate_size);
      EXPECT_EQ(static_cast<int64_t>(layer.down_norm.size()), config.intermediate_size);
      for (const TernaryMatrix* m :
           {&layer.i, &layer.f, &layer.g, &layer.o, &layer.gate, &layer.down}) {
        EXPECT_TRUE(Aligned(m->codes));
        EXPECT_GT(m->scale, 0.0f);
        EXPECT_TRUE(ValidTernaryCodes(m->rows, m->cols, m->codes));
      }
      for (const absl::Span<const float>& v : {layer.attn_norm, layer.g_norm, layer.down_norm}) {
        EXPECT_TRUE(Aligned(v.data()));
        for (const float value : v) EXPECT_NEAR(value, 1.0f, 0.11f);
      }
      for (const float bound : layer.lower_bound) {
        EXPECT_GE(bound, 0.0f);
        EXPECT_LT(bound, 1.0f);
        EXPECT_EQ(bound == 0.0f, n == 0);
      }
    }
    EXPECT_EQ(model->embedding().dtype, DType::kF16);
    const auto* halves = static_cast<const uint16_t*>(model->embedding().data);
    for (int64_t k = 0; k < config.vocab_size * config.hidden_size; ++k) {
      const float magnitude = std::fabs(HalfToFloat(halves[k]));
      ASSERT_TRUE(magnitude >= 0.125f && magnitude < 0.5f) << magnitude;
    }
  }
}

TEST(RandomModelTest, AboutTwoThirdsOfTheWeightsAreNonzeroAndSignsBalance) {
  const auto model = Model::Random(*ConfigForShape("tales"), 2);
  const TernaryMatrix& matrix = model->lm_head();
  int64_t counts[3] = {};
  for (int64_t r = 0; r < matrix.rows; ++r) {
    for (int64_t k = 0; k < matrix.cols; ++k) ++counts[matrix.Weight(r, k) + 1];
  }
  const double all = static_cast<double>(matrix.rows * matrix.cols);
  EXPECT_NEAR(static_cast<double>(counts[0]) / all, 21.0 / 64, 0.003);
  EXPECT_NEAR(static_cast<double>(counts[1]) / all, 22.0 / 64, 0.003);
  EXPECT_NEAR(static_cast<double>(counts[2]) / all, 21.0 / 64, 0.003);
}

TEST(RandomModelTest, WithoutLowerBoundsTheyAreZero) {
  ModelConfig config = TinyCheckpoint::OddConfig();
  config.use_lower_bound = false;
  const auto model = Model::Random(config, 1);
  for (const LayerWeights& layer : model->layers()) {
    for (const float bound : layer.lower_bound) EXPECT_EQ(bound, 0.0f);
  }
}

TEST(RandomModelTest, CountsBytesAndParameters) {
  const ModelConfig config = *ConfigForShape("tales");
  const auto model = Model::Random(config, 1);
  // L (4 D^2 + 3 D F) + V D weights at four a byte; no padding at this shape.
  EXPECT_EQ(model->ternary_bytes(), (6 * (4 * 512 * 512 + 3 * 512 * 1536) + 4096 * 512) / 4);
  EXPECT_EQ(model->parameters(), 24679424);
}

}  // namespace
}  // namespace mmfree
