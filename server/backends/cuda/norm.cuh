// The ordered sums of a norm and what follows from them, for 256 threads (one lane each).
#ifndef MMFREE_SERVER_BACKENDS_CUDA_NORM_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_NORM_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/batch_math.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {

inline constexpr int kNormWarps = kNormLanes / 32;

// Strides 1 to 16 of the contract's tree. Addition commutes, so every lane ends with the same bits.
__device__ __forceinline__ float WarpTreeSum(float value) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, stride);
  }
  return value;
}

// Strides 32 to 128.
__device__ __forceinline__ float CrossWarpTreeSum(const float* warps) {
  return ((warps[0] + warps[1]) + (warps[2] + warps[3])) +
         ((warps[4] + warps[5]) + (warps[6] + warps[7]));
}

// |t| as bits: ordered as unsigned integers, so that a maximum is one instruction a warp.
__device__ __forceinline__ uint32_t AbsBits(float t) { return FloatToBits(t) & 0x7fffffffu; }

__device__ __forceinline__ float4 Times(const float4& a, const float4& b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float MaxAbs(const float4& v) {
  return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
__device__ __forceinline__ uint32_t MaxAbsBits(const float4& v) {
  return max(max(AbsBits(v.x), AbsBits(v.y)), max(AbsBits(v.z), AbsBits(v.w)));
}

// Four codes as one word, least significant first.
__device__ __forceinline__ uint32_t PackCodes(int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
  uint32_t high;
  uint32_t word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(c3), "r"(c2));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(c1), "r"(c0), "r"(high));
  return word;
}

// The multiplier of a row's codes. `plain`: it is 127 / max|t|, so that no product with it needs
// the clamp of QuantizeCode.
struct CodeScale {
  float scale;
  bool plain;
};

template <bool kPlain>
__device__ __forceinline__ int32_t Code(float t, float scale) {
  if constexpr (kPlain) {
    // |y| <= 127 (1 + 2^-22): the clamp would not change what truncation leaves.
    const float y = t * scale;
    return static_cast<int32_t>(y + BitsToFloat(0x3effffffu | (FloatToBits(y) & 0x80000000u)));
  } else {
    return QuantizeCode(t, scale);
  }
}

// The codes of four columns y * w; adds them to `sum`.
template <bool kPlain>
__device__ __forceinline__ uint32_t QuantizeQuad(const float4& y, const float4& w, float scale,
                                                 int32_t* sum) {
  const uint32_t codes = PackCodes(Code<kPlain>(y.x * w.x, scale), Code<kPlain>(y.y * w.y, scale),
                                   Code<kPlain>(y.z * w.z, scale), Code<kPlain>(y.w * w.w, scale));
  *sum = __dp4a(static_cast<int32_t>(codes), 0x01010101, *sum);
  return codes;
}

// At least the square of the inverse of the factor of a row's norms. z: with one norm the largest
// |x|, with two the largest of |y| and sqrt(eps) * |x|, which may be rounded up.
//
// The factor is 1 / sqrt(mean(x^2) + eps), or with two norms
// 1 / sqrt(mean(y^2) + eps * (mean(x^2) + eps)). A mean is at most the largest square: mean(x^2),
// or mean(y^2) and eps * mean(x^2), are at most z^2.
template <bool kOneNorm>
__device__ __forceinline__ float NormBound(float z, float eps) {
  return kOneNorm ? fmaf(z, z, eps) : fmaf(2.0f * z, z, eps * eps);
}

// Whether a row's codes have the scale DivideOrdinary(127, max_t), which is known before the sums
// of its norms: surely the clamp of the smallest maximum, kMinAbsMax, does not act on max_t times
// the factor of the norms, and the quotient is exact. max_t: the largest |y * w2|; bound: of
// NormBound. False for infinity and NaN.
__device__ __forceinline__ bool ClampSurelyIdle(float max_t, float bound) {
  constexpr float kSure = 2.0f * kMinAbsMax;  // leaves room for rounding
  return max_t * max_t > kSure * kSure * bound && IsOrdinary(max_t, 1.0f);
}

// The partial results of a row, one entry a warp.
template <int kOutputs>
struct NormPartials {
  float xx[kNormWarps];
  float yy[kNormWarps];
  uint32_t max_bits[kOutputs][kNormWarps];
  int32_t code_sum[kOutputs][kNormWarps];
};

// Folds a warp's lanes and leaves them in `partials`; the caller then synchronizes the row's
// threads.
template <int kOutputs>
__device__ __forceinline__ void StorePartials(float sum_xx, float sum_yy,
                                              const uint32_t (&max_bits)[kOutputs], int warp,
                                              int lane, NormPartials<kOutputs>* partials) {
  sum_xx = WarpTreeSum(sum_xx);
  sum_yy = WarpTreeSum(sum_yy);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const uint32_t bits = __reduce_max_sync(0xffffffffu, max_bits[o]);
    if (lane == 0) partials->max_bits[o][warp] = bits;
  }
  if (lane == 0) {
    partials->xx[warp] = sum_xx;
    partials->yy[warp] = sum_yy;
  }
}

template <bool kOneNorm, int kOutputs>
__device__ __forceinline__ RowScale ScaleOf(const NormPartials<kOutputs>& partials, int output,
                                            float n, float eps) {
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) bits = max(bits, partials.max_bits[output][w]);
  const float max_abs = BitsToFloat(bits);
  const float sum_xx = CrossWarpTreeSum(partials.xx);
  if constexpr (kOneNorm) {
    return ScaleOneNorm(sum_xx, max_abs, n, eps);
  } else {
    return ScaleTwoNorms(sum_xx, CrossWarpTreeSum(partials.yy), max_abs, n, eps);
  }
}

// ScaleOneNorm(...).code or ScaleTwoNorms(...).code, sooner: where a coarse estimate shows that the
// clamp of the smallest maximum does not act, the code needs neither the exact sums nor their
// roots.
template <bool kOneNorm>
__device__ __forceinline__ CodeScale CodeScaleFrom(float sum_xx, float sum_yy, float max_abs,
                                                   float n, float eps) {
  const float inverse_n = __fdividef(1.0f, n);
  const float r1 = rsqrtf(fmaf(sum_xx, inverse_n, eps));
  float estimate = r1 * max_abs;
  if constexpr (!kOneNorm) estimate *= rsqrtf(fmaf(r1 * r1 * sum_yy, inverse_n, eps));
  constexpr float kLargest = 1e30f;  // leaves out infinity and NaN
  if (estimate > 2.0f * kMinAbsMax && max_abs < kLargest) return {127.0f / max_abs, true};
  if constexpr (kOneNorm) return {ScaleOneNorm(sum_xx, max_abs, n, eps).code, false};
  return {ScaleTwoNorms(sum_xx, sum_yy, max_abs, n, eps).code, false};
}

// ScaleOf(...).code, sooner.
template <bool kOneNorm, int kOutputs>
__device__ __forceinline__ CodeScale CodeScaleOf(const NormPartials<kOutputs>& partials, int output,
                                                 float n, float eps) {
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) bits = max(bits, partials.max_bits[output][w]);
  const float sum_yy = kOneNorm ? 0.0f : CrossWarpTreeSum(partials.yy);
  return CodeScaleFrom<kOneNorm>(CrossWarpTreeSum(partials.xx), sum_yy, BitsToFloat(bits), n, eps);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_NORM_CUH_
