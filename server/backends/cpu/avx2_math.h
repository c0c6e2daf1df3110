// server/base/numerics.h on eight floats: the same operations in the same order on each.
//
// Only for files compiled for AVX2; everything is static, so nothing of it is shared with others.
#ifndef MMFREE_SERVER_BACKENDS_CPU_AVX2_MATH_H_
#define MMFREE_SERVER_BACKENDS_CPU_AVX2_MATH_H_

#include <immintrin.h>

#include "server/base/numerics.h"

namespace mmfree::cpu::avx2 {

static inline __m256 Exp(__m256 x) {
  using C = ExpConstants;
  x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(C::kHigh)), _mm256_set1_ps(C::kLow));
  const __m256 magic = _mm256_set1_ps(C::kMagic);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(C::kLog2E), magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-C::kLn2High), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(-C::kLn2Low), r);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(C::kC4), r, _mm256_set1_ps(C::kC3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::kC2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::kC1));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::kC0));
  const __m256 y = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r), _mm256_set1_ps(1.0f));
  const __m256i scale = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                         _mm256_set1_epi32(0x3f800000));
  return _mm256_mul_ps(y, _mm256_castsi256_ps(scale));
}

// 1 + exp(-x).
static inline __m256 OnePlusExpMinus(__m256 x) {
  return _mm256_add_ps(_mm256_set1_ps(1.0f), Exp(_mm256_xor_ps(x, _mm256_set1_ps(-0.0f))));
}

static inline __m256 Sigmoid(__m256 x) {
  return _mm256_div_ps(_mm256_set1_ps(1.0f), OnePlusExpMinus(x));
}

static inline __m256 Silu(__m256 x) { return _mm256_div_ps(x, OnePlusExpMinus(x)); }

static inline __m256 Recur(__m256 state, __m256 forget, __m256 input, __m256 lower_bound,
                           __m256 one_minus_lower_bound) {
  const __m256 f = _mm256_fmadd_ps(one_minus_lower_bound, Sigmoid(forget), lower_bound);
  const __m256 i = _mm256_mul_ps(Silu(input), _mm256_sub_ps(_mm256_set1_ps(1.0f), f));
  return _mm256_fmadd_ps(f, state, i);
}

static inline __m256 GateOutput(__m256 g, __m256 g_norm, __m256 state) {
  return _mm256_mul_ps(_mm256_mul_ps(g, g_norm), Silu(state));
}

static inline __m256i QuantizeCodes(__m256 t, __m256 multiplier) {
  __m256 y = _mm256_mul_ps(t, multiplier);
  y = _mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-128.0f));
  const __m256 sign = _mm256_and_ps(y, _mm256_set1_ps(-0.0f));
  const __m256 half = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x3effffff)));
  return _mm256_cvttps_epi32(_mm256_add_ps(y, half));
}

// All bits of the first `count` (0 to 8) elements.
static inline __m256i FirstMask(int64_t count) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}

static inline int64_t MinInt(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace mmfree::cpu::avx2

#endif  // MMFREE_SERVER_BACKENDS_CPU_AVX2_MATH_H_
