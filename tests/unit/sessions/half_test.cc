#include "server/sessions/half.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"
#include "server/model/convert.h"

namespace mmfree {
namespace {

float FromHalf(TensorType type, uint16_t bits) {
  uint8_t bytes[2];
  memcpy(bytes, &bits, sizeof(bytes));
  float value = 0.0f;
  EXPECT_TRUE(ConvertToFloat(type, bytes, 1, &value));
  return value;
}

// Every finite value of the format survives, and a value between two neighbours goes to the nearer
// one, in the middle to the even one.
void ExpectNearestEven(TensorType type, uint16_t infinity, uint16_t (*round)(float)) {
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const float value = FromHalf(type, bits);
    ASSERT_EQ(round(value), bits);
    ASSERT_EQ(round(-value), bits | 0x8000);
    if (bits + 1 == infinity) break;
    const float next = FromHalf(type, static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((static_cast<double>(value) + next) / 2);
    ASSERT_EQ(round(middle), bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(round(std::nextafter(middle, value)), bits) << bits;
    ASSERT_EQ(round(std::nextafter(middle, next)), bits + 1) << bits;
  }
}

TEST(Half, Binary16RoundsToNearestEven) {
  ExpectNearestEven(TensorType::kF16, 0x7c00, FloatToHalf);
}

TEST(Half, Bfloat16RoundsToNearestEven) {
  // Below its normal range the middle of two values is not a binary32 value, so start above.
  for (uint32_t bits = 0x0080; bits + 1 < 0x7f80; ++bits) {
    const float value = FromHalf(TensorType::kBF16, static_cast<uint16_t>(bits));
    ASSERT_EQ(FloatToBfloat16(value), bits);
    const float middle = BitsToFloat(bits << 16 | 0x8000u);
    ASSERT_EQ(FloatToBfloat16(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(FloatToBfloat16(BitsToFloat(bits << 16 | 0x7fffu)), bits);
    ASSERT_EQ(FloatToBfloat16(BitsToFloat(bits << 16 | 0x8001u)), bits + 1);
  }
}

TEST(Half, TooLargeBecomesTheLargestFiniteValue) {
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7bff);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfbff);
  EXPECT_EQ(FloatToBfloat16(3.4028235e38f), 0x7f7f);
  EXPECT_EQ(FloatToBfloat16(-3.4028235e38f), 0xff7f);
}

}  // namespace
}  // namespace mmfree
