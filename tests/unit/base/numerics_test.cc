// The scalar functions of the bit-identity contract against higher precision, over dense sweeps.
// The bounds are those of server/model/NUMERICS.md.
#include "server/base/numerics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mmfree {
namespace {

// |value - exact| in units of the last place of the float nearest to `exact`.
double UlpError(float value, long double exact) {
  const float nearest = static_cast<float>(exact);
  const float magnitude = std::max(std::fabs(nearest), std::numeric_limits<float>::min());
  const float ulp = std::nextafter(magnitude, std::numeric_limits<float>::infinity()) - magnitude;
  return static_cast<double>(std::fabs((static_cast<long double>(value) - exact) / ulp));
}

struct Worst {
  double error = 0;
  float at = 0;
  void Update(double candidate, float x) {
    if (!(candidate <= error)) {  // NaN is worst
      error = candidate;
      at = x;
    }
  }
};

// Calls visit(x) for every `stride`-th float from low to high.
template <typename Visit>
void SweepFloats(float low, float high, uint32_t stride, Visit visit) {
  // Order-preserving map of floats to integers.
  const auto key = [](float x) {
    const uint32_t bits = FloatToBits(x);
    return int64_t{bits & 0x80000000u ? -static_cast<int64_t>(bits & 0x7fffffffu)
                                      : static_cast<int64_t>(bits)};
  };
  for (int64_t k = key(low); k <= key(high); k += stride) {
    visit(BitsToFloat(k < 0 ? static_cast<uint32_t>(-k) | 0x80000000u : static_cast<uint32_t>(k)));
  }
}

constexpr uint32_t kStride = 1021;  // prime: every pattern of low bits is met; two million points

TEST(NumericsTest, ExpIsWithinItsBound) {
  Worst worst;
  SweepFloats(-87.0f, 88.0f, kStride, [&](float x) {
    worst.Update(UlpError(Exp(x), std::exp(static_cast<long double>(x))), x);
  });
  RecordProperty("exp_max_ulp", std::to_string(worst.error));
  EXPECT_LT(worst.error, 1.0) << "at " << worst.at;
}

TEST(NumericsTest, ExpIsClampedAndExactAtZero) {
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-0.0f), 1.0f);
  EXPECT_EQ(Exp(-1000.0f), Exp(-87.0f));
  EXPECT_EQ(Exp(-std::numeric_limits<float>::infinity()), Exp(-87.0f));
  EXPECT_EQ(Exp(1000.0f), Exp(88.0f));
  EXPECT_TRUE(std::isfinite(Exp(88.0f)));
  EXPECT_GE(Exp(-87.0f), std::numeric_limits<float>::min());
}

TEST(NumericsTest, ExpNeverFallsWhereItsArgumentRises) {
  float previous = 0;
  SweepFloats(-87.0f, 88.0f, kStride, [&](float x) {
    const float y = Exp(x);
    ASSERT_GE(y, previous) << x;
    previous = y;
  });
}

TEST(NumericsTest, SigmoidIsWithinItsBound) {
  Worst worst;
  SweepFloats(-86.0f, 86.0f, kStride, [&](float x) {
    const long double exact = 1.0L / (1.0L + std::exp(-static_cast<long double>(x)));
    worst.Update(UlpError(Sigmoid(x), exact), x);
    ASSERT_GE(Sigmoid(x), 0.0f);
    ASSERT_LE(Sigmoid(x), 1.0f);
  });
  RecordProperty("sigmoid_max_ulp", std::to_string(worst.error));
  EXPECT_LT(worst.error, 2.5) << "at " << worst.at;
  EXPECT_EQ(Sigmoid(0.0f), 0.5f);
  EXPECT_EQ(Sigmoid(100.0f), 1.0f);
}

TEST(NumericsTest, SiluIsWithinItsBound) {
  Worst worst;
  SweepFloats(-80.0f, 86.0f, kStride, [&](float x) {
    const long double exact = x / (1.0L + std::exp(-static_cast<long double>(x)));
    worst.Update(UlpError(Silu(x), exact), x);
  });
  RecordProperty("silu_max_ulp", std::to_string(worst.error));
  EXPECT_LT(worst.error, 2.5) << "at " << worst.at;
  EXPECT_EQ(Silu(0.0f), 0.0f);
}

TEST(NumericsTest, LogIsWithinItsBoundOnEveryNormal) {
  Worst worst;
  SweepFloats(
      std::numeric_limits<float>::min(), std::numeric_limits<float>::max(), kStride,
      [&](float x) { worst.Update(UlpError(Log(x), std::log(static_cast<long double>(x))), x); });
  // Densely around 1, where the result is near zero.
  SweepFloats(0.70f, 1.42f, 7, [&](float x) {
    worst.Update(UlpError(Log(x), std::log(static_cast<long double>(x))), x);
  });
  RecordProperty("log_max_ulp", std::to_string(worst.error));
  EXPECT_LT(worst.error, 1.5) << "at " << worst.at;
  EXPECT_EQ(Log(1.0f), 0.0f);
}

// Round half away from zero, as the reference quantises.
int32_t ReferenceCode(float y) {
  return static_cast<int32_t>(std::min(127.0f, std::max(-128.0f, std::round(y))));
}

TEST(NumericsTest, QuantizeCodeRoundsHalfAwayFromZero) {
  // Every float near every half and integer in range, and a sweep of all between.
  for (int half_steps = -260; half_steps <= 260; ++half_steps) {
    const float middle = static_cast<float>(half_steps) * 0.5f;
    float down = middle;
    float up = middle;
    for (int i = 0; i < 64; ++i) {
      ASSERT_EQ(QuantizeCode(down, 1.0f), ReferenceCode(down)) << down;
      ASSERT_EQ(QuantizeCode(up, 1.0f), ReferenceCode(up)) << up;
      down = std::nextafter(down, -1000.0f);
      up = std::nextafter(up, 1000.0f);
    }
  }
  SweepFloats(-130.0f, 130.0f, 257,
              [&](float y) { ASSERT_EQ(QuantizeCode(y, 1.0f), ReferenceCode(y)) << y; });
}

TEST(NumericsTest, QuantizeCodeMultipliesInSinglePrecisionAndClamps) {
  EXPECT_EQ(QuantizeCode(3.0f, 0.5f), 2);
  EXPECT_EQ(QuantizeCode(-3.0f, 0.5f), -2);
  EXPECT_EQ(QuantizeCode(1e30f, 1e30f), 127);
  EXPECT_EQ(QuantizeCode(-1e30f, 1e30f), -128);
  EXPECT_EQ(QuantizeCode(std::numeric_limits<float>::quiet_NaN(), 1.0f), 127);
}

TEST(NumericsTest, RowScaleOfOneNormMatchesTheFormula) {
  // v = x / sqrt(mean(x^2) + eps) * w; a = max(max|v|, 1e-5); q = round(v * 127 / a); y * a / 127.
  const std::vector<double> x = {0.5, -2.0, 1.25, 0.0, 3.0};
  const std::vector<double> w = {1.0, 0.5, 2.0, 1.0, 0.25};
  double sum = 0, max_t = 0;
  for (size_t k = 0; k < x.size(); ++k) {
    sum += x[k] * x[k];
    max_t = std::max(max_t, std::fabs(x[k] * w[k]));
  }
  const double rms = 1 / std::sqrt(sum / 5 + 1e-6);
  const RowScale scale = ScaleOneNorm(static_cast<float>(sum), static_cast<float>(max_t), 5, 1e-6f);
  EXPECT_NEAR(scale.out, rms * max_t / 127, 1e-7);
  for (size_t k = 0; k < x.size(); ++k) {
    const double v = rms * x[k] * w[k];
    EXPECT_EQ(QuantizeCode(static_cast<float>(x[k] * w[k]), scale.code),
              std::lround(v * 127 / (rms * max_t)));
  }
}

TEST(NumericsTest, ATinyRowIsQuantisedWithTheClampedMaximum) {
  for (const float value : {0.0f, 1e-12f}) {
    const RowScale scale = ScaleOneNorm(value * value, value, 1, 1e-6f);
    EXPECT_EQ(scale.out, 1e-5f / 127.0f);
    const double v = value / std::sqrt(value * value + 1e-6);
    EXPECT_NEAR(value * scale.code, v * 127 / 1e-5, 1e-3);
  }
}

TEST(NumericsTest, RowScaleOfTwoNormsMatchesTheFormula) {
  // u = rms(x, w1), v = rms(u, w2) on one row, with the second mean square taken from x * w1.
  const std::vector<double> x = {0.3, -1.7, 2.5};
  const std::vector<double> w1 = {0.9, 1.1, 0.7};
  const std::vector<double> w2 = {1.3, 0.2, 0.6};
  double sum_x = 0, sum_y = 0, max_t = 0, mean_u = 0;
  for (int k = 0; k < 3; ++k) sum_x += x[k] * x[k];
  const double r1 = 1 / std::sqrt(sum_x / 3 + 1e-6);
  for (int k = 0; k < 3; ++k) {
    sum_y += std::pow(x[k] * w1[k], 2);
    mean_u += std::pow(x[k] * r1 * w1[k], 2) / 3;
    max_t = std::max(max_t, std::fabs(x[k] * w1[k] * w2[k]));
  }
  const double r2 = 1 / std::sqrt(mean_u + 1e-6);
  const RowScale scale = ScaleTwoNorms(static_cast<float>(sum_x), static_cast<float>(sum_y),
                                       static_cast<float>(max_t), 3, 1e-6f);
  EXPECT_NEAR(scale.out, r1 * r2 * max_t / 127, 1e-8);
  EXPECT_NEAR(scale.code, 127 / max_t, 1e-4);
}

TEST(NumericsTest, RecurIsTheFormulaOfTheRecurrence) {
  for (const double state : {-3.0, 0.0, 0.7}) {
    for (const double forget : {-4.0, 0.0, 2.5}) {
      for (const double input : {-1.5, 0.0, 3.0}) {
        for (const double bound : {0.0, 0.25, 0.9}) {
          const double f = bound + (1 - bound) / (1 + std::exp(-forget));
          const double i = input / (1 + std::exp(-input)) * (1 - f);
          EXPECT_NEAR(Recur(static_cast<float>(state), static_cast<float>(forget),
                            static_cast<float>(input), static_cast<float>(bound),
                            1.0f - static_cast<float>(bound)),
                      f * state + i, 2e-6);
        }
      }
    }
  }
}

// Value of a binary16 from its definition.
double HalfValue(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == 31) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  return exponent == 0 ? sign * std::ldexp(fraction, -24)
                       : sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(NumericsTest, EveryHalfConvertsExactly) {
  for (uint32_t half = 0; half < 65536; ++half) {
    const float value = HalfToFloat(static_cast<uint16_t>(half));
    const double expected = HalfValue(static_cast<uint16_t>(half));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << half;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << half;
    }
    ASSERT_EQ(std::signbit(value), (half & 0x8000) != 0) << half;
  }
}

TEST(NumericsTest, Bfloat16IsTheUpperHalfOfAFloat) {
  EXPECT_EQ(Bfloat16ToFloat(0x3f80), 1.0f);
  EXPECT_EQ(Bfloat16ToFloat(0xc040), -3.0f);
  EXPECT_EQ(FloatToBits(Bfloat16ToFloat(0x0001)), 0x00010000u);
  EXPECT_TRUE(std::isnan(Bfloat16ToFloat(0x7fc0)));
}

TEST(NumericsTest, MinAndMaxGiveTheSecondOperandForNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Min(nan, 1.0f), 1.0f);
  EXPECT_EQ(Max(nan, 1.0f), 1.0f);
  EXPECT_TRUE(std::isnan(Min(1.0f, nan)));
  EXPECT_TRUE(std::isnan(Max(1.0f, nan)));
}

}  // namespace
}  // namespace mmfree
