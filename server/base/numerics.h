// The scalar arithmetic of the bit-identity contract (server/model/NUMERICS.md), shared by every
// backend.
//
// Each function is a fixed sequence of IEEE binary32 operations, round to nearest even, with `fma`
// only where written. The vector kernels (AVX2, AVX-512) and the CUDA kernels perform the same
// operations in the same order on each element, so they give the same bits. Compile with
// -ffp-contract=off (nvcc: -fmad=false -prec-div=true -prec-sqrt=true -ftz=false).
//
// Everything here is constexpr-free, allocation-free and thread-safe.
#ifndef MMFREE_SERVER_BASE_NUMERICS_H_
#define MMFREE_SERVER_BASE_NUMERICS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMFREE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMFREE_HOST_DEVICE inline
#endif

namespace mmfree {

// Partial sums of a norm: element k belongs to lane k % kNormLanes (NUMERICS.md, "Order of the
// sums").
inline constexpr int kNormLanes = 256;

// Smallest absolute maximum a row is quantised with (the reference's clamp in activation_quant).
inline constexpr float kMinAbsMax = 1e-5f;

MMFREE_HOST_DEVICE float BitsToFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MMFREE_HOST_DEVICE uint32_t FloatToBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// min and max as the x86 instructions define them: the second operand when either is NaN.
MMFREE_HOST_DEVICE float Min(float a, float b) { return a < b ? a : b; }
MMFREE_HOST_DEVICE float Max(float a, float b) { return a > b ? a : b; }

// Constants of Exp, named so that the vector versions use the same ones.
struct ExpConstants {
  static constexpr float kLow = -87.0f;  // exp(-87) = 1.6e-38, the last normal result
  static constexpr float kHigh = 88.0f;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 * (c0 + c1 r + ... + c4 r^4) on |r| <= ln(2)/2, minimax in relative error.
  static constexpr float kC0 = 0.4999999403953552f;
  static constexpr float kC1 = 0.1666651964187622f;
  static constexpr float kC2 = 0.04166839271783829f;
  static constexpr float kC3 = 0.008368780836462975f;
  static constexpr float kC4 = 0.0013814467238262296f;
};

// e^x for x clamped to [-87, 88]. Error in NUMERICS.md; exact order:
//   n = round(x log2 e);  r = x - n ln 2 (two fma);  p = Horner(c4..c0) (fma);
//   y = fma(r*r, p, r) + 1;  y * 2^n.
MMFREE_HOST_DEVICE float Exp(float x) {
  using C = ExpConstants;
  x = Max(Min(x, C::kHigh), C::kLow);
  const float shifted = fmaf(x, C::kLog2E, C::kMagic);
  const float n = shifted - C::kMagic;
  float r = fmaf(n, -C::kLn2High, x);
  r = fmaf(n, -C::kLn2Low, r);
  float p = fmaf(C::kC4, r, C::kC3);
  p = fmaf(p, r, C::kC2);
  p = fmaf(p, r, C::kC1);
  p = fmaf(p, r, C::kC0);
  const float y = fmaf(r * r, p, r) + 1.0f;
  // shifted holds n in its low mantissa bits; the shift leaves n in the exponent field.
  return y * BitsToFloat((FloatToBits(shifted) << 23) + 0x3f800000u);
}

// 1 / (1 + e^-x).
MMFREE_HOST_DEVICE float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

// x * sigmoid(x), as one division.
MMFREE_HOST_DEVICE float Silu(float x) { return x / (1.0f + Exp(-x)); }

// Natural logarithm of a positive normal x (others: unspecified but finite or -inf, never a trap).
MMFREE_HOST_DEVICE float Log(float x) {
  uint32_t bits = FloatToBits(x);
  // m in [sqrt(1/2), sqrt(2)), x = m 2^e.
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  bits -= static_cast<uint32_t>(e) << 23;
  const float f = BitsToFloat(bits) - 1.0f;
  float p = fmaf(0.0674663856625557f, f, -0.11675651371479034f);
  p = fmaf(p, f, 0.11888162791728973f);
  p = fmaf(p, f, -0.1240558922290802f);
  p = fmaf(p, f, 0.14219552278518677f);
  p = fmaf(p, f, -0.1666799634695053f);
  p = fmaf(p, f, 0.2000211924314499f);
  p = fmaf(p, f, -0.25000008940696716f);
  p = fmaf(p, f, 0.3333331346511841f);
  const float f2 = f * f;
  // log(1+f) = f - f^2/2 + f^3 p, then e ln 2 in two parts.
  float y = f2 * f * p;
  const float fe = static_cast<float>(e);
  y = fmaf(fe, ExpConstants::kLn2Low, y);
  y = fmaf(f2, -0.5f, y);
  y = y + f;
  return fmaf(fe, ExpConstants::kLn2High, y);
}

// Rounds half away from zero and clamps to [-128, 127]: the int8 code of value t under multiplier
// m. Adding the largest float below 0.5 and truncating is exact for |y| <= 127 (tests/unit/base).
// NaN becomes 127, as on every vector path.
MMFREE_HOST_DEVICE int32_t QuantizeCode(float t, float multiplier) {
  float y = t * multiplier;
  y = Max(Min(y, 127.0f), -128.0f);
  const float half = BitsToFloat(0x3effffffu | (FloatToBits(y) & 0x80000000u));
  return static_cast<int32_t>(y + half);
}

// How a row t[0..n) (the norm's input times its weights, without the RMS factor) becomes int8 codes
// and how a product of those codes becomes floats again:
//   q_k = QuantizeCode(t_k, code);   y = float(sum_k q_k T_k) * (out * weight_scale).
struct RowScale {
  float code;
  float out;
};

// The factors of one norm, v = x * factor * w, and of two stacked ones, of which the first one's is
// `first`. See ScaleOneNorm and ScaleTwoNorms.
MMFREE_HOST_DEVICE float RmsFactor(float sum_xx, float n, float eps) {
  return 1.0f / sqrtf(sum_xx / n + eps);
}
MMFREE_HOST_DEVICE float StackedRmsFactor(float first, float sum_yy, float n, float eps) {
  return first * (1.0f / sqrtf(fmaf(first * first, sum_yy / n, eps)));
}

MMFREE_HOST_DEVICE RowScale ScaleFromFactor(float rms_factor, float max_abs_t) {
  const float abs_max = rms_factor * max_abs_t;
  RowScale scale;
  if (abs_max >= kMinAbsMax) {
    scale.code = 127.0f / max_abs_t;
    scale.out = abs_max / 127.0f;
  } else {
    scale.code = (rms_factor * 127.0f) / kMinAbsMax;
    scale.out = kMinAbsMax / 127.0f;
  }
  return scale;
}

// One norm: v = x / sqrt(mean(x^2) + eps) * w with t = x*w.
//   sum_xx  ordered sum of x^2 over the row;  max_abs_t  max |t|;  n  row length as float.
MMFREE_HOST_DEVICE RowScale ScaleOneNorm(float sum_xx, float max_abs_t, float n, float eps) {
  return ScaleFromFactor(RmsFactor(sum_xx, n, eps), max_abs_t);
}

// Two stacked norms: u = rms(x, w1), v = rms(u, w2) with y = x*w1 and t = y*w2. The second mean
// square is r1^2 mean(y^2).
MMFREE_HOST_DEVICE RowScale ScaleTwoNorms(float sum_xx, float sum_yy, float max_abs_t, float n,
                                          float eps) {
  const float r1 = RmsFactor(sum_xx, n, eps);
  return ScaleFromFactor(StackedRmsFactor(r1, sum_yy, n, eps), max_abs_t);
}

// The recurrence of one channel. forget/input are the products' outputs, lower_bound is lb_n of the
// layer (0 for layer 0) and one_minus_lower_bound is 1 - lb_n. Returns the new state.
MMFREE_HOST_DEVICE float Recur(float state, float forget, float input, float lower_bound,
                               float one_minus_lower_bound) {
  const float f = fmaf(one_minus_lower_bound, Sigmoid(forget), lower_bound);
  const float i = Silu(input) * (1.0f - f);
  return fmaf(f, state, i);
}

// Second factor pair of the output projection's input: y = (g * g_norm) * silu(state).
MMFREE_HOST_DEVICE float GateOutput(float g, float g_norm, float state) {
  return (g * g_norm) * Silu(state);
}

// silu(p) * r of the gated MLP.
MMFREE_HOST_DEVICE float SwiGlu(float p, float r) { return Silu(p) * r; }

// IEEE binary16 and bfloat16 to binary32, exactly.
MMFREE_HOST_DEVICE float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return BitsToFloat(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return BitsToFloat(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24 is exact.
  return BitsToFloat(sign | FloatToBits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}
MMFREE_HOST_DEVICE float Bfloat16ToFloat(uint16_t value) {
  return BitsToFloat(static_cast<uint32_t>(value) << 16);
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_NUMERICS_H_
