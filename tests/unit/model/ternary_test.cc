#include "server/model/ternary.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace mmfree {
namespace {

struct Shape {
  int64_t rows, cols;
};

std::vector<Shape> OddShapes() {
  std::vector<Shape> shapes;
  for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 13}) {
    for (const int64_t cols : {1, 3, 63, 64, 65, 127, 128, 200}) shapes.push_back({rows, cols});
  }
  return shapes;
}

std::vector<uint8_t> PackMatrix(const std::vector<float>& dense, Shape shape, float scale) {
  std::vector<uint8_t> codes(TernaryMatrix::Bytes(shape.rows, shape.cols), 0xff);
  for (int64_t first = 0; first < shape.rows; first += kTernaryRowGroup) {
    std::vector<const float*> rows;
    for (int64_t r = first; r < std::min(first + kTernaryRowGroup, shape.rows); ++r) {
      rows.push_back(dense.data() + r * shape.cols);
    }
    PackRowGroup(rows, shape.cols, scale,
                 codes.data() + first / kTernaryRowGroup * TernaryMatrix::PaddedCols(shape.cols));
  }
  return codes;
}

TEST(TernaryTest, PackedWeightsReadBackOnEveryShapeAndPaddingIsZero) {
  std::mt19937 random(7);
  for (const Shape shape : OddShapes()) {
    std::vector<float> dense(shape.rows * shape.cols);
    for (float& value : dense) value = static_cast<float>(static_cast<int>(random() % 5) - 2);
    const std::vector<uint8_t> codes = PackMatrix(dense, shape, 1.0f);
    const TernaryMatrix matrix{shape.rows, shape.cols, 1.0f, codes.data()};
    ASSERT_EQ(matrix.bytes(), static_cast<int64_t>(codes.size()));
    for (int64_t r = 0; r < matrix.row_groups() * kTernaryRowGroup; ++r) {
      for (int64_t k = 0; k < matrix.padded_cols(); ++k) {
        const bool inside = r < shape.rows && k < shape.cols;
        const float expected = inside ? std::clamp(dense[r * shape.cols + k], -1.0f, 1.0f) : 0.0f;
        ASSERT_EQ(matrix.Weight(r, k), expected)
            << shape.rows << "x" << shape.cols << " at " << r << "," << k;
      }
    }
    EXPECT_TRUE(ValidTernaryCodes(shape.rows, shape.cols, codes.data()));
  }
}

TEST(TernaryTest, WeightIsRoundHalfEvenOfTheQuotientClamped) {
  std::mt19937 random(8);
  std::uniform_real_distribution<float> uniform(-2.5f, 2.5f);
  for (int n = 0; n < 100000; ++n) {
    const float scale = std::fabs(uniform(random)) + 1e-5f;
    const float w = uniform(random) * scale;
    const float expected = std::clamp(std::nearbyint(w / scale), -1.0f, 1.0f);
    ASSERT_EQ(TernaryWeight(w, scale), expected) << w << " / " << scale;
  }
  EXPECT_EQ(TernaryWeight(0.5f, 1.0f), 0);
  EXPECT_EQ(TernaryWeight(-0.5f, 1.0f), 0);
  EXPECT_EQ(TernaryWeight(std::nextafter(0.5f, 1.0f), 1.0f), 1);
  EXPECT_EQ(TernaryWeight(std::nextafter(-0.5f, -1.0f), 1.0f), -1);
  EXPECT_EQ(TernaryWeight(1e30f, 1.0f), 1);
  EXPECT_EQ(TernaryWeight(-0.0f, 1.0f), 0);
}

TEST(TernaryTest, ScaleIsTheMeanAndNotBelowItsFloor) {
  EXPECT_EQ(TernaryScale(6.0, 4), 1.5f);
  EXPECT_EQ(TernaryScale(0.0, 4), 1e-5f);
  EXPECT_EQ(TernaryScale(1e-6, 1), 1e-5f);
}

TEST(TernaryTest, ClearingThePaddingMakesAnyCodesWithoutThreesValid) {
  std::mt19937 random(9);
  for (const Shape shape : OddShapes()) {
    std::vector<uint8_t> codes(TernaryMatrix::Bytes(shape.rows, shape.cols));
    for (uint8_t& byte : codes) byte = random() % 2 == 0 ? 0x00 : 0xaa;
    const std::vector<uint8_t> before = codes;
    ClearTernaryPadding(shape.rows, shape.cols, codes.data());
    EXPECT_TRUE(ValidTernaryCodes(shape.rows, shape.cols, codes.data()));
    const TernaryMatrix was{shape.rows, shape.cols, 1.0f, before.data()};
    const TernaryMatrix is{shape.rows, shape.cols, 1.0f, codes.data()};
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (int64_t k = 0; k < shape.cols; ++k) ASSERT_EQ(was.Weight(r, k), is.Weight(r, k));
    }
  }
}

TEST(TernaryTest, FindsACodeOfThreeAndFilledPaddingAnywhere) {
  const Shape shape{6, 70};
  const std::vector<float> dense(shape.rows * shape.cols, 1.0f);
  const std::vector<uint8_t> good = PackMatrix(dense, shape, 1.0f);
  ASSERT_TRUE(ValidTernaryCodes(shape.rows, shape.cols, good.data()));
  const TernaryMatrix matrix{shape.rows, shape.cols, 1.0f, good.data()};
  for (size_t byte = 0; byte < good.size(); ++byte) {
    for (int j = 0; j < 4; ++j) {
      std::vector<uint8_t> bad = good;
      bad[byte] = static_cast<uint8_t>(bad[byte] | (3 << (2 * j)));
      EXPECT_FALSE(ValidTernaryCodes(shape.rows, shape.cols, bad.data())) << byte << " " << j;
      const int64_t row = static_cast<int64_t>(byte) / matrix.padded_cols() * 4 + j;
      const int64_t col = static_cast<int64_t>(byte) % matrix.padded_cols();
      bad[byte] = static_cast<uint8_t>(good[byte] & ~(3 << (2 * j)));
      const bool inside = row < shape.rows && col < shape.cols;
      EXPECT_EQ(ValidTernaryCodes(shape.rows, shape.cols, bad.data()), inside) << byte << " " << j;
    }
  }
}

}  // namespace
}  // namespace mmfree
