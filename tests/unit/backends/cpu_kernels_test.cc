// Each elementwise kernel gives the same bits as the scalar one, at every length and tail.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/panel.h"
#include "server/model/ternary.h"
#include "tests/unit/backends/cpu_test_support.h"

namespace mmfree {
namespace {

using cpu::FloatType;
using cpu::Kernels;
using cpu::NormInput;
using cpu::NormStats;

class ElementwiseTest : public VectorKernelsTest {};

INSTANTIATE_TEST_SUITE_P(Isa, ElementwiseTest, testing::ValuesIn(kVectorIsas), IsaTestName);

// All lengths around the vector and lane counts, and a few beyond.
std::vector<int64_t> Lengths() {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t n : {127, 128, 250, 255, 256, 257, 300, 511, 512, 513, 1000, 2816, 6911}) {
    lengths.push_back(n);
  }
  return lengths;
}

const float kSpecial[] = {0.0f,
                          -0.0f,
                          1e-45f,
                          -1e-40f,
                          1e-38f,
                          100.0f,
                          -100.0f,
                          3e38f,
                          -3e38f,
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()};

// Mostly ordinary values, with special ones sprinkled in when asked for.
std::vector<float> Values(TestRandom& random, int64_t n, bool special) {
  std::vector<float> values = random.Floats(n, -8.0f, 8.0f);
  for (float& value : values) {
    if (special && random.Below(5) == 0) value = kSpecial[random.Below(std::size(kSpecial))];
  }
  return values;
}

TEST_P(ElementwiseTest, GatherConvertsEveryHalfAndBfloat16Exactly) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (FloatType type : {FloatType::kF16, FloatType::kBF16}) {
    std::vector<float> expected(all.size());
    std::vector<float> actual(all.size());
    scalar_->gather(type, all.data(), 65536, expected.data());
    vector_->gather(type, all.data(), 65536, actual.data());
    for (size_t i = 0; i < all.size(); ++i) {
      if (std::isnan(expected[i])) {
        EXPECT_TRUE(std::isnan(actual[i])) << i;
      } else {
        EXPECT_TRUE(SameBits(expected[i], actual[i])) << i;
      }
    }
  }
}

TEST_P(ElementwiseTest, GatherWritesNothingBeyondTheEnd) {
  TestRandom random(1);
  const std::vector<float> values = random.Floats(200, -1.0f, 1.0f);
  for (FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
    for (int64_t n = 1; n <= 70; ++n) {
      std::vector<float> expected(100, 7.0f);
      std::vector<float> actual(100, 7.0f);
      scalar_->gather(type, values.data(), n, expected.data());
      vector_->gather(type, values.data(), n, actual.data());
      EXPECT_TRUE(SameBits(expected, actual)) << n;
    }
  }
}

// The three kinds of input that a norm takes.
std::vector<NormInput> NormInputs(const std::vector<float>& x, const std::vector<float>& y,
                                  const std::vector<std::vector<float>>& w, int64_t n) {
  const NormInput three = {
      x.data(), w[3].data(), nullptr, {w[0].data(), w[1].data(), w[2].data()}, 3, n};
  const NormInput stacked = {x.data(), w[3].data(), nullptr, {w[0].data()}, 1, n};
  const NormInput given = {x.data(), nullptr, y.data(), {w[1].data()}, 1, n};
  const NormInput one = {x.data(), nullptr, nullptr, {w[2].data()}, 1, n};
  return {three, stacked, given, one};
}

TEST_P(ElementwiseTest, NormSumsAndMaximaAreTheSameBits) {
  TestRandom random(2);
  for (bool special : {false, true}) {
    for (int64_t n : Lengths()) {
      const std::vector<float> x = Values(random, n, special);
      const std::vector<float> y = Values(random, n, special);
      std::vector<std::vector<float>> w(4);
      for (std::vector<float>& weights : w) weights = random.Floats(n, 0.5f, 1.5f);
      for (const NormInput& in : NormInputs(x, y, w, n)) {
        NormStats expected = {};
        NormStats actual = {};
        scalar_->norm_stats(in, &expected);
        vector_->norm_stats(in, &actual);
        EXPECT_TRUE(SameBits(expected.sum_xx, actual.sum_xx)) << n;
        if (in.w1 != nullptr || in.y != nullptr) {
          EXPECT_TRUE(SameBits(expected.sum_yy, actual.sum_yy)) << n;
        }
        for (int i = 0; i < in.num_w2; ++i) {
          EXPECT_TRUE(SameBits(expected.max_t[i], actual.max_t[i])) << n;
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, ANanIsPassedOverByTheMaximumAndTakesTheSumWithIt) {
  for (int64_t n : {5, 300}) {
    for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
      std::vector<float> x(static_cast<size_t>(n), 0.5f);
      x[static_cast<size_t>(at)] = std::numeric_limits<float>::quiet_NaN();
      const std::vector<float> w(static_cast<size_t>(n), 1.0f);
      const NormInput in = {x.data(), nullptr, nullptr, {w.data()}, 1, n};
      for (const Kernels* kernels : {scalar_, vector_}) {
        NormStats stats = {};
        kernels->norm_stats(in, &stats);
        EXPECT_TRUE(std::isnan(stats.sum_xx));
        EXPECT_EQ(stats.max_t[0], 0.5f);
      }
    }
  }
}

// The codes of one token in natural order.
std::vector<int8_t> CodesInOrder(const cpu::CodePlace& place, int64_t cols) {
  std::vector<int8_t> codes(static_cast<size_t>(cols));
  for (int64_t k = 0; k < cols; ++k) {
    codes[static_cast<size_t>(k)] = place.codes[k / place.chunk * place.stride + k % place.chunk];
  }
  return codes;
}

TEST_P(ElementwiseTest, CodesAndTheirSumAreTheSameInEveryTileShape) {
  TestRandom random(3);
  for (bool special : {false, true}) {
    for (int64_t n : Lengths()) {
      const std::vector<float> x = Values(random, n, special);
      const std::vector<float> y = Values(random, n, special);
      std::vector<std::vector<float>> w(4);
      for (std::vector<float>& weights : w) weights = random.Floats(n, 0.5f, 1.5f);
      const int64_t cols = TernaryMatrix::PaddedCols(n);
      for (const NormInput& in : NormInputs(x, y, w, n)) {
        const float multiplier = random.Uniform(0.1f, 30.0f);
        const int which = static_cast<int>(random.Below(in.num_w2));
        std::vector<int8_t> expected(static_cast<size_t>(cols), 99);
        const int32_t sum =
            scalar_->quantize(in, which, multiplier, cols, {expected.data(), 64, 64});
        for (int s = 0; s < vector_->num_shapes; ++s) {
          cpu::PanelLayout layout;
          const int32_t tokens = vector_->shapes[s].per_vector * vector_->shapes[s].vectors;
          layout.Set(*vector_, tokens, cols);
          std::vector<int8_t> panel(static_cast<size_t>(layout.bytes()), 99);
          const cpu::CodePlace place =
              layout.Place(panel.data(), static_cast<int32_t>(random.Below(tokens)));
          EXPECT_EQ(vector_->quantize(in, which, multiplier, cols, place), sum);
          EXPECT_EQ(CodesInOrder(place, cols), expected) << "n " << n << " tokens " << tokens;
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, AnInfiniteOrNanMultiplierGivesTheSameCodesAndZeroPadding) {
  const std::vector<float> x = {0.0f, 1.0f, -1.0f, 0.25f, -0.0f};
  const std::vector<float> w(5, 1.0f);
  const NormInput in = {x.data(), nullptr, nullptr, {w.data()}, 1, 5};
  for (float multiplier : {std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(), 0.0f, 3e38f}) {
    std::vector<int8_t> expected(64, 99);
    std::vector<int8_t> actual(64, 99);
    const int32_t chunk = vector_->vector_bytes;
    EXPECT_EQ(scalar_->quantize(in, 0, multiplier, 64, {expected.data(), 64, 64}),
              vector_->quantize(in, 0, multiplier, 64, {actual.data(), chunk, chunk}));
    EXPECT_EQ(expected, actual);
    EXPECT_EQ(std::vector<int8_t>(expected.begin() + 5, expected.end()),
              std::vector<int8_t>(59, 0));
  }
}

TEST_P(ElementwiseTest, TheScanGivesTheSameStatesAndOutputs) {
  TestRandom random(4);
  for (bool special : {false, true}) {
    for (int64_t channels = 1; channels <= 70; ++channels) {
      for (int64_t tokens : {1, 2, 5}) {
        const int64_t ld_gates = channels + 3;
        const int64_t ld = channels + 5;
        const std::vector<float> forget = Values(random, tokens * ld_gates, special);
        const std::vector<float> input = Values(random, tokens * ld_gates, special);
        const std::vector<float> g = Values(random, tokens * ld, false);
        const std::vector<float> lower_bound = random.Floats(channels, 0.0f, 0.9f);
        const std::vector<float> g_norm = random.Floats(channels, 0.5f, 1.5f);
        const std::vector<float> start = random.Floats(channels + 1, -2.0f, 2.0f);
        const auto run = [&](const Kernels& kernels, std::vector<float>* state,
                             std::vector<float>* y) {
          *state = start;
          y->assign(static_cast<size_t>(tokens * ld), 7.0f);
          kernels.scan({tokens, channels, forget.data(), input.data(), ld_gates, g.data(),
                        y->data(), ld, state->data(), lower_bound.data(), g_norm.data()});
        };
        std::vector<float> expected_state, expected_y, state, y;
        run(*scalar_, &expected_state, &expected_y);
        run(*vector_, &state, &y);
        EXPECT_TRUE(SameBits(expected_state, state)) << channels;
        EXPECT_TRUE(SameBits(expected_y, y)) << channels;
      }
    }
  }
}

TEST_P(ElementwiseTest, SwiGluGivesTheSameBits) {
  TestRandom random(5);
  for (int64_t n : Lengths()) {
    std::vector<float> p = Values(random, n, true);
    for (float& value : p) value *= 20.0f;
    const std::vector<float> r = Values(random, n, false);
    std::vector<float> expected(static_cast<size_t>(n) + 1, 7.0f);
    std::vector<float> actual = expected;
    scalar_->swiglu(p.data(), r.data(), n, expected.data());
    vector_->swiglu(p.data(), r.data(), n, actual.data());
    EXPECT_TRUE(SameBits(expected, actual)) << n;
  }
}

}  // namespace
}  // namespace mmfree
