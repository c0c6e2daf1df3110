// What a product does with its integer sums, shared by the kernels that multiply.
//
// A thread holds, for a tile of 16 slots and two neighbouring tokens, c[0], c[1] of its first slot
// and c[2], c[3] (times four) of its second (layout.h).
#ifndef MMFREE_SERVER_BACKENDS_CUDA_EPILOGUE_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_EPILOGUE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/kernels.h"
#include "server/base/numerics.h"

namespace mmfree::cuda {

// Stores two neighbouring floats if `exists`. to: in global memory, eight-byte aligned. One access
// and no branch, where the compiler may make two accesses of an assignment and a branch of an if.
__device__ __forceinline__ void StorePair(float* to, float2 pair, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.s32 exists, %3, 0;\n"
      "@exists st.global.v2.f32 [%0], {%1, %2};\n"
      "}\n" ::"l"(to),
      "f"(pair.x), "f"(pair.y), "r"(static_cast<int>(exists))
      : "memory");
}

// The values of a thread's two slots from their sums; kResidual adds to `residual`, kSwiGlu gives
// one.
template <Epilogue kEpilogue>
__device__ __forceinline__ float2 TokenValues(int32_t first, int32_t second_times_4, RowMeta meta,
                                              float weight_scale, float2 residual) {
  const float factor = meta.out * weight_scale;
  const float a = static_cast<float>(first - meta.code_sum);
  const float b = static_cast<float>((second_times_4 >> 2) - meta.code_sum);
  if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    return make_float2(SwiGlu(a * factor, b * factor), 0.0f);
  } else if constexpr (kEpilogue == Epilogue::kResidual) {
    return make_float2(fmaf(a, factor, residual.x), fmaf(b, factor, residual.y));
  } else {
    return make_float2(a * factor, b * factor);
  }
}

// Finishes one token: `first` and `second` are the sums of the thread's two slots, `out` the row of
// the token, `tile` the index of the 16-slot tile in its matrix, g the slot. kResidual adds to
// `residual`, the values at `out`.
template <Epilogue kEpilogue>
__device__ __forceinline__ void FinishToken(int32_t first, int32_t second_times_4, RowMeta meta,
                                            float weight_scale, int64_t tile, int g, float* out,
                                            int64_t ld, float2 residual) {
  const float2 values = TokenValues<kEpilogue>(first, second_times_4, meta, weight_scale, residual);
  if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    const int64_t channel = tile * (kTileRows / 2) + g;
    if (channel < ld) out[channel] = values.x;
  } else {
    const int64_t row = tile * kTileRows + 2 * g;
    StorePair(out + row, values, row < ld);
  }
}

// The same, reading the residual where it will be written.
template <Epilogue kEpilogue>
__device__ __forceinline__ void FinishToken(int32_t first, int32_t second_times_4, RowMeta meta,
                                            float weight_scale, int64_t tile, int g, float* out,
                                            int64_t ld) {
  float2 residual = make_float2(0.0f, 0.0f);
  if constexpr (kEpilogue == Epilogue::kResidual) {
    const int64_t row = tile * kTileRows + 2 * g;
    if (row >= ld) return;
    residual = *reinterpret_cast<const float2*>(out + row);
  }
  FinishToken<kEpilogue>(first, second_times_4, meta, weight_scale, tile, g, out, ld, residual);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_EPILOGUE_CUH_
