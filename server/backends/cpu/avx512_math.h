// server/base/numerics.h on sixteen floats: the same operations in the same order on each.
//
// Only for files compiled for AVX-512; everything is static, so nothing of it is shared with
// others.
#ifndef MMFREE_SERVER_BACKENDS_CPU_AVX512_MATH_H_
#define MMFREE_SERVER_BACKENDS_CPU_AVX512_MATH_H_

#include <immintrin.h>

#include "server/base/numerics.h"

namespace mmfree::cpu::avx512 {

static inline __m512 Exp(__m512 x) {
  using C = ExpConstants;
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(C::kHigh)), _mm512_set1_ps(C::kLow));
  const __m512 magic = _mm512_set1_ps(C::kMagic);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(C::kLog2E), magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-C::kLn2High), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(-C::kLn2Low), r);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(C::kC4), r, _mm512_set1_ps(C::kC3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::kC2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::kC1));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::kC0));
  const __m512 y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0f));
  const __m512i scale = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23),
                                         _mm512_set1_epi32(0x3f800000));
  return _mm512_mul_ps(y, _mm512_castsi512_ps(scale));
}

// 1 + exp(-x).
static inline __m512 OnePlusExpMinus(__m512 x) {
  return _mm512_add_ps(_mm512_set1_ps(1.0f), Exp(_mm512_xor_ps(x, _mm512_set1_ps(-0.0f))));
}

static inline __m512 Sigmoid(__m512 x) {
  return _mm512_div_ps(_mm512_set1_ps(1.0f), OnePlusExpMinus(x));
}

static inline __m512 Silu(__m512 x) { return _mm512_div_ps(x, OnePlusExpMinus(x)); }

static inline __m512 Recur(__m512 state, __m512 forget, __m512 input, __m512 lower_bound,
                           __m512 one_minus_lower_bound) {
  const __m512 f = _mm512_fmadd_ps(one_minus_lower_bound, Sigmoid(forget), lower_bound);
  const __m512 i = _mm512_mul_ps(Silu(input), _mm512_sub_ps(_mm512_set1_ps(1.0f), f));
  return _mm512_fmadd_ps(f, state, i);
}

static inline __m512 GateOutput(__m512 g, __m512 g_norm, __m512 state) {
  return _mm512_mul_ps(_mm512_mul_ps(g, g_norm), Silu(state));
}

static inline __m512i QuantizeCodes(__m512 t, __m512 multiplier) {
  __m512 y = _mm512_mul_ps(t, multiplier);
  y = _mm512_max_ps(_mm512_min_ps(y, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-128.0f));
  const __m512 sign = _mm512_and_ps(y, _mm512_set1_ps(-0.0f));
  const __m512 half = _mm512_or_ps(sign, _mm512_castsi512_ps(_mm512_set1_epi32(0x3effffff)));
  return _mm512_cvttps_epi32(_mm512_add_ps(y, half));
}

// The first `count` elements; all sixteen for 16 and more, none for 0 and less.
static inline __mmask16 FirstMask(int64_t count) {
  if (count >= 16) return 0xffff;
  return count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

}  // namespace mmfree::cpu::avx512

#endif  // MMFREE_SERVER_BACKENDS_CPU_AVX512_MATH_H_
