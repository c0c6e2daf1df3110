#include "server/model/convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "server/base/numerics.h"

namespace mmfree {
namespace {

template <typename T>
std::vector<uint8_t> Bytes(const std::vector<T>& values, size_t misalign) {
  std::vector<uint8_t> bytes(misalign + values.size() * sizeof(T));
  memcpy(bytes.data() + misalign, values.data(), values.size() * sizeof(T));
  return bytes;
}

bool Is16BitFinite(TensorType type, uint16_t bits) {
  const uint16_t exponent = type == TensorType::kF16 ? 0x7c00 : 0x7f80;
  return (bits & exponent) != exponent;
}

TEST(ConvertTest, EveryFinite16BitValueConvertsExactly) {
  for (const TensorType type : {TensorType::kF16, TensorType::kBF16}) {
    std::vector<uint16_t> finite;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      if (Is16BitFinite(type, static_cast<uint16_t>(bits))) finite.push_back(bits);
    }
    const std::vector<uint8_t> bytes = Bytes(finite, 1);
    std::vector<float> out(finite.size());
    ASSERT_TRUE(
        ConvertToFloat(type, bytes.data() + 1, static_cast<int64_t>(out.size()), out.data()));
    for (size_t k = 0; k < finite.size(); ++k) {
      const float expected =
          type == TensorType::kF16 ? HalfToFloat(finite[k]) : Bfloat16ToFloat(finite[k]);
      ASSERT_EQ(FloatToBits(out[k]), FloatToBits(expected)) << finite[k];
    }
  }
}

TEST(ConvertTest, EveryInfinityAndNaNIsFoundAtEveryPlace) {
  float out[21];
  for (const TensorType type : {TensorType::kF16, TensorType::kBF16}) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      if (Is16BitFinite(type, static_cast<uint16_t>(bits))) continue;
      std::vector<uint16_t> values(21, 0x3c00);
      values[bits % values.size()] = static_cast<uint16_t>(bits);
      const std::vector<uint8_t> bytes = Bytes(values, 0);
      ASSERT_FALSE(ConvertToFloat(type, bytes.data(), 21, out)) << bits;
    }
  }
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    for (size_t place = 0; place < 21; ++place) {
      std::vector<float> values(21, std::numeric_limits<float>::max());
      values[place] = bad;
      const std::vector<uint8_t> bytes = Bytes(values, 3);
      ASSERT_FALSE(ConvertToFloat(TensorType::kF32, bytes.data() + 3, 21, out));
    }
  }
}

TEST(ConvertTest, IntegersAreNotWeights) {
  const uint8_t bytes[4] = {};
  float out[1];
  EXPECT_FALSE(ConvertToFloat(TensorType::kU8, bytes, 1, out));
  EXPECT_FALSE(ConvertToFloat(TensorType::kI32, bytes, 1, out));
}

TEST(ConvertTest, RowAbsSumHasTheDocumentedOrder) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1e3f);
  for (const int64_t n : {1, 7, 8, 9, 64, 1001}) {
    std::vector<float> row(n);
    for (float& value : row) value = normal(random) * normal(random) * normal(random);
    double lanes[8] = {};
    for (int64_t k = 0; k < n; ++k) lanes[k % 8] += std::fabs(static_cast<double>(row[k]));
    double expected = lanes[0];
    for (int lane = 1; lane < 8; ++lane) expected += lanes[lane];
    EXPECT_EQ(RowAbsSum(row.data(), n), expected);
  }
}

}  // namespace
}  // namespace mmfree
