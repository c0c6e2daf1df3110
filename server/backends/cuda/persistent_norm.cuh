// Norm and quantisation of a stage's rows by a block of the persistent decode kernel. The codes
// need the maxima of a row, not the ordered sums of its norms: those are formed by some of the
// warps while the others multiply.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {

// Loads the rows, keeps x and y (y * w1 where there is w1) in shared memory and finds this warp's
// maxima: of |y * w2|, and of z, which bounds the norms (Quantize). `parity` is that of the stage.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void LoadRows(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                         const StageBuffers& buffers, int32_t num_rows,
                                         float root_eps, uint32_t parity) {
  using T = StageTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr int kBatch = T::kOneNorm ? 4 : 2;  // quads of a thread in flight
  constexpr float4 kZero = {0.0f, 0.0f, 0.0f, 0.0f};
  const int padded = args.padded_cols;
  const int warp = threadIdx.x / 32;
  bool waited = false;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    int32_t source = row;
    if (args.gather != nullptr) source = row < num_rows ? args.gather[row].token : 0;
    const float* const from_x = args.x + int64_t{source} * args.ld_x;
    const float* const from_y = T::kHasY ? args.y + int64_t{source} * args.ld_x : nullptr;
    float max_z = 0.0f;
    uint32_t max_t[kOutputs] = {};
#pragma unroll 1
    for (int base = 4 * threadIdx.x; base < padded; base += kBatch * 4 * kComputingThreads) {
      // All that is read from memory comes before what is written: the compiler cannot tell whether
      // they overlap.
      float4 x[kBatch];
      float4 y[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = base + i * 4 * kComputingThreads;
        x[i] = k < args.ld_x ? __ldcg(reinterpret_cast<const float4*>(from_x + k)) : kZero;
        if constexpr (T::kHasY) {
          y[i] = k < args.ld_x ? __ldcg(reinterpret_cast<const float4*>(from_y + k)) : kZero;
        }
      }
      if (!waited) BarrierWait(SharedAddress(&block.norms), parity);
      waited = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = base + i * 4 * kComputingThreads;
        if (k >= padded) break;
        float4 w2[kOutputs];
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          w2[o] = *reinterpret_cast<const float4*>(buffers.w2 + o * padded + k);
        }
        if constexpr (T::kHasW1) {
          const float4 w1 = *reinterpret_cast<const float4*>(buffers.w1 + k);
          y[i] = make_float4(x[i].x * w1.x, x[i].y * w1.y, x[i].z * w1.z, x[i].w * w1.w);
        }
        if constexpr (T::kOneNorm) y[i] = x[i];
        *reinterpret_cast<float4*>(buffers.x + row * padded + k) = x[i];
        const float abs_x =
            fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w)));
        if constexpr (T::kOneNorm) {
          max_z = fmaxf(max_z, abs_x);
        } else {
          *reinterpret_cast<float4*>(buffers.y + row * padded + k) = y[i];
          const float abs_y =
              fmaxf(fmaxf(fabsf(y[i].x), fabsf(y[i].y)), fmaxf(fabsf(y[i].z), fabsf(y[i].w)));
          max_z = fmaxf(fmaxf(max_z, abs_y), root_eps * abs_x);
        }
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          max_t[o] = max(max_t[o], max(max(AbsBits(y[i].x * w2[o].x), AbsBits(y[i].y * w2[o].y)),
                                       max(AbsBits(y[i].z * w2[o].z), AbsBits(y[i].w * w2[o].w))));
        }
      }
    }
    const uint32_t z_bits = __reduce_max_sync(0xffffffffu, FloatToBits(max_z));
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) max_t[o] = __reduce_max_sync(0xffffffffu, max_t[o]);
    if (threadIdx.x % 32 == 0) {
      block.max_z[row][warp] = z_bits;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) block.max_t[o][row][warp] = max_t[o];
    }
  }
}

// The ordered sums of the rows' norms, by the summing warps.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void Sums(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                     const StageBuffers& buffers) {
  constexpr bool kOneNorm = StageTraits<kKind>::kOneNorm;
  const int norm_lane = threadIdx.x - 32 * kFirstSummingWarp;
  float sum_xx[kRows] = {};
  float sum_yy[kRows] = {};
#pragma unroll 4
  for (int k = norm_lane; k < args.cols; k += kNormLanes) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float x = buffers.x[row * args.padded_cols + k];
      sum_xx[row] = fmaf(x, x, sum_xx[row]);
      if constexpr (!kOneNorm) {
        const float y = buffers.y[row * args.padded_cols + k];
        sum_yy[row] = fmaf(y, y, sum_yy[row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    sum_xx[row] = WarpTreeSum(sum_xx[row]);
    if constexpr (!kOneNorm) sum_yy[row] = WarpTreeSum(sum_yy[row]);
    if (threadIdx.x % 32 == 0) {
      block.partials[row].xx[norm_lane / 32] = sum_xx[row];
      block.partials[row].yy[norm_lane / 32] = sum_yy[row];
    }
  }
}

template <NormKind kKind, int kRows>
__device__ __forceinline__ RowScale Scale(const PersistentBlock<kRows>& block,
                                          const DecodeArgs& args, int output, int row) {
  const float n = static_cast<float>(args.cols);
  const float max_abs = BitsToFloat(block.row_max[output][row]);
  const float sum_xx = CrossWarpTreeSum(block.partials[row].xx);
  if constexpr (StageTraits<kKind>::kOneNorm) {
    return ScaleOneNorm(sum_xx, max_abs, n, args.eps);
  } else {
    return ScaleTwoNorms(sum_xx, CrossWarpTreeSum(block.partials[row].yy), max_abs, n, args.eps);
  }
}

template <NormKind kKind, bool kPlain, int kRows>
__device__ __forceinline__ void QuantizeAll(
    PersistentBlock<kRows>& block, const DecodeArgs& args, const StageBuffers& buffers,
    const float (&scales)[StageTraits<kKind>::kOutputs][kRows]) {
  constexpr int kOutputs = StageTraits<kKind>::kOutputs;
  const int padded = args.padded_cols;
  int32_t sums[kOutputs][kRows] = {};
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * kComputingThreads) {
    float4 y[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float* const from = StageTraits<kKind>::kOneNorm ? buffers.x : buffers.y;
      y[row] = *reinterpret_cast<const float4*>(from + row * padded + k);
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float4 w = *reinterpret_cast<const float4*>(buffers.w2 + o * padded + k);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int at = (o * kRows + row) * (padded + kCodePadding) + k;
        *reinterpret_cast<uint32_t*>(buffers.codes + at) =
            QuantizeQuad<kPlain>(y[row], w, scales[o][row], &sums[o][row]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int32_t sum = __reduce_add_sync(0xffffffffu, sums[o][row]);
      if (threadIdx.x % 32 == 0) block.warp_code_sums[o][row][threadIdx.x / 32] = sum;
    }
  }
}

// The codes of all rows, from the warps' maxima.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void QuantizeBlock(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                              const StageBuffers& buffers) {
  constexpr int kOutputs = StageTraits<kKind>::kOutputs;
  const int thread = threadIdx.x;
  const int from = min(thread % 32, kComputingWarps - 1);
  float scales[kOutputs][kRows];
  bool plain = true;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float z = BitsToFloat(__reduce_max_sync(0xffffffffu, block.max_z[row][from]));
    // The factor of the norms is 1 / sqrt(mean(x^2) + eps), or with two of them
    // 1 / sqrt(mean(y^2) + eps * (mean(x^2) + eps)): a mean is at most the largest square, and z is
    // the largest of |x|, or of |y| and sqrt(eps) * |x|. So the factor is at least 1 / sqrt(bound).
    const float bound = StageTraits<kKind>::kOneNorm ? fmaf(z, z, args.eps)
                                                     : fmaf(2.0f * z, z, args.eps * args.eps);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const uint32_t bits = __reduce_max_sync(0xffffffffu, block.max_t[o][row][from]);
      const float max_t = BitsToFloat(bits);
      if (thread == 0) block.row_max[o][row] = bits;
      scales[o][row] = DivideOrdinary(127.0f, max_t);
      // As in CodeScaleOf: surely the clamp of the smallest maximum does not act; and the quotient
      // is exact. False for infinity and NaN.
      constexpr float kSure = 2.0f * kMinAbsMax;
      plain = plain && max_t * max_t > kSure * kSure * bound && IsOrdinary(max_t, 1.0f);
    }
  }
  if (plain) {
    QuantizeAll<kKind, true>(block, args, buffers, scales);
    return;
  }
  Sync<Among::kComputing>();
  if (thread >= 32 * kFirstSummingWarp) Sums<kKind>(block, args, buffers);
  Sync<Among::kComputing>();
  if (thread < kOutputs * kRows) {
    block.code_scales[thread % kOutputs][thread / kOutputs] =
        Scale<kKind>(block, args, thread % kOutputs, thread / kOutputs).code;
  }
  Sync<Among::kComputing>();
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) scales[o][row] = block.code_scales[o][row];
  }
  QuantizeAll<kKind, false>(block, args, buffers, scales);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_
