// Sigmoid and Silu (numerics.h) of several values at a time: the same bits, without the branch that
// each IEEE division otherwise takes for unusual operands and that keeps them from overlapping.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_BATCH_MATH_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_BATCH_MATH_CUH_

#include <cuda_runtime.h>

#include "server/base/numerics.h"

namespace mmfree::cuda {

// Whether DivideOrdinary(a, b) is exact for b >= 1: neither the quotient nor a remainder comes near
// the subnormals or overflow.
__device__ __forceinline__ bool IsOrdinary(float a, float b) {
  constexpr float kSmall = 8.6736174e-19f;  // 2^-60
  constexpr float kLarge = 1.1529215e18f;   // 2^60
  return fabsf(a) >= kSmall && fabsf(a) <= kLarge && b <= kLarge;
}

// a / b rounded to nearest even, for ordinary operands: Newton steps on the reciprocal, then two on
// the quotient (the fast path of the compiler's own division).
__device__ __forceinline__ float DivideOrdinary(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  reciprocal = fmaf(reciprocal, fmaf(-b, reciprocal, 1.0f), reciprocal);
  float quotient = a * reciprocal;
  quotient = fmaf(reciprocal, fmaf(-b, quotient, a), quotient);
  return fmaf(reciprocal, fmaf(-b, quotient, a), quotient);
}

// y = a / b for b >= 1; y may be a.
template <int kCount>
__device__ __forceinline__ void DivideBatch(const float (&a)[kCount], const float (&b)[kCount],
                                            float (&y)[kCount]) {
  float quotient[kCount];
  bool ordinary = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    quotient[i] = DivideOrdinary(a[i], b[i]);
    ordinary = ordinary && IsOrdinary(a[i], b[i]);
  }
  if (!ordinary) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) quotient[i] = a[i] / b[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] = quotient[i];
}

// y = Silu(x); y may be x.
template <int kCount>
__device__ __forceinline__ void SiluBatch(const float (&x)[kCount], float (&y)[kCount]) {
  float divisor[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) divisor[i] = 1.0f + Exp(-x[i]);
  DivideBatch(x, divisor, y);
}

// y = Sigmoid(x); y may be x.
template <int kCount>
__device__ __forceinline__ void SigmoidBatch(const float (&x)[kCount], float (&y)[kCount]) {
  float one[kCount];
  float divisor[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    one[i] = 1.0f;
    divisor[i] = 1.0f + Exp(-x[i]);
  }
  DivideBatch(one, divisor, y);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_BATCH_MATH_CUH_
