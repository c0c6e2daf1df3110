// Norm and quantisation of a stage's rows by a block of the persistent decode kernel. The codes
// need the maxima of a row, not the ordered sums of its norms: those are formed by some of the
// warps while the others make the codes.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/persistent_block.cuh"
#include "server/backends/cuda/persistent_exchange.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {

// Where a stage's rows come from: of each row [ld_x] values, and for kScanned as many of y.
struct RowSource {
  const float* x;
  const float* y;
  bool exchanged;  // by the stage before (persistent_exchange.cuh)
};

// Four values of each of a thread's quads of one row; those beyond the row, or of a row that does
// not exist, are zeros.
template <int kBatch>
struct Quads {
  float4 values[kBatch];

  __device__ __forceinline__ void Load(const float* from, int base, int end) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = base + i * 4 * kBlockThreads;
      values[i] = k < end ? LoadExchanged(from + k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  // Loads again what was missing; whether anything was.
  __device__ __forceinline__ bool Reload(const float* from, int base) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (AnyMissing(values[i])) {
        values[i] = LoadExchanged(from + base + i * 4 * kBlockThreads);
        missing = true;
      }
    }
    return missing;
  }
};

// Loads the rows as they arrive, keeps x and y (y * w1 where there is w1) in shared memory and
// finds this warp's maxima: of |y * w2|, and of z, which bounds the norms (NormBound).
// `parity` is that of the stage.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void LoadRows(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                         const StageBuffers& buffers, const RowSource& source,
                                         int32_t num_rows, float root_eps, uint32_t parity) {
  using T = NormTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  constexpr int kBatch = T::kOneNorm ? 4 : 2;  // quads of a thread and row in flight
  const int padded = args.padded_cols;
  const int warp = threadIdx.x / 32;
  const float* from_x[kRows];
  const float* from_y[kRows];
  int end[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    int32_t index = row;
    if (args.gather != nullptr) index = row < num_rows ? args.gather[row].token : 0;
    from_x[row] = source.x + int64_t{index} * args.ld_x;
    from_y[row] = T::kHasY ? source.y + int64_t{index} * args.ld_x : nullptr;
    end[row] = row < num_rows ? args.ld_x : 0;
  }
  float max_z[kRows] = {};
  uint32_t max_t[kOutputs][kRows] = {};
  BarrierWait(SharedAddress(&block.norms), parity);
#pragma unroll 1
  for (int base = 4 * threadIdx.x; base < padded; base += kBatch * 4 * kBlockThreads) {
    Quads<kBatch> x[kRows];
    Quads<kBatch> y[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      x[row].Load(from_x[row], base, end[row]);
      if constexpr (T::kHasY) y[row].Load(from_y[row], base, end[row]);
    }
    if (source.exchanged) {
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          missing |= x[row].Reload(from_x[row], base);
          if constexpr (T::kHasY) missing |= y[row].Reload(from_y[row], base);
        }
      } while (missing);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = base + i * 4 * kBlockThreads;
      if (k >= padded) break;
      float4 w1;
      float4 w2[kOutputs];
      if constexpr (T::kHasW1) w1 = *reinterpret_cast<const float4*>(buffers.w1 + k);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        w2[o] = *reinterpret_cast<const float4*>(buffers.w2 + o * padded + k);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float4 own_x = x[row].values[i];
        float4 own_y = own_x;
        if constexpr (T::kHasW1) own_y = Times(own_x, w1);
        if constexpr (T::kHasY) own_y = y[row].values[i];
        *reinterpret_cast<float4*>(buffers.x + row * padded + k) = own_x;
        if constexpr (T::kOneNorm) {
          max_z[row] = fmaxf(max_z[row], MaxAbs(own_x));
        } else {
          *reinterpret_cast<float4*>(buffers.y + row * padded + k) = own_y;
          max_z[row] = fmaxf(fmaxf(max_z[row], MaxAbs(own_y)), root_eps * MaxAbs(own_x));
        }
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          max_t[o][row] = max(max_t[o][row], MaxAbsBits(Times(own_y, w2[o])));
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const uint32_t z_bits = __reduce_max_sync(0xffffffffu, FloatToBits(max_z[row]));
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      max_t[o][row] = __reduce_max_sync(0xffffffffu, max_t[o][row]);
    }
    if (threadIdx.x % 32 == 0) {
      block.max_z[row][warp] = z_bits;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) block.max_t[o][row][warp] = max_t[o][row];
    }
  }
}

// The contract's tree of sums: strides 1 to 32 by a warp that has lanes 2n and 2n + 1 of 64 ...
__device__ __forceinline__ float PairTreeSum(const float2& pair) {
  return WarpTreeSum(pair.x + pair.y);
}
// ... and strides 64 and 128.
__device__ __forceinline__ float CrossPairTreeSum(const float (&warps)[kSummingWarps]) {
  static_assert(kSummingWarps == 4);
  return (warps[0] + warps[1]) + (warps[2] + warps[3]);
}

// The ordered sums of the rows' norms, by the summing warps.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void Sums(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                     const StageBuffers& buffers) {
  constexpr bool kOneNorm = NormTraits<kKind>::kOneNorm;
  const int warp = threadIdx.x / 32 - kQuantizingWarps;
  const int first = 64 * warp + 2 * (threadIdx.x % 32);
  float2 xx[kRows] = {};
  float2 yy[kRows] = {};
  // Beyond a row are zeros: one of them may be the second of a pair.
#pragma unroll 4
  for (int k = first; k < args.cols; k += kNormLanes) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const auto x = *reinterpret_cast<const float2*>(buffers.x + row * args.padded_cols + k);
      xx[row] = make_float2(fmaf(x.x, x.x, xx[row].x), fmaf(x.y, x.y, xx[row].y));
      if constexpr (!kOneNorm) {
        const auto y = *reinterpret_cast<const float2*>(buffers.y + row * args.padded_cols + k);
        yy[row] = make_float2(fmaf(y.x, y.x, yy[row].x), fmaf(y.y, y.y, yy[row].y));
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum_xx = PairTreeSum(xx[row]);
    const float sum_yy = kOneNorm ? 0.0f : PairTreeSum(yy[row]);
    if (threadIdx.x % 32 == 0) {
      block.sum_xx[row][warp] = sum_xx;
      block.sum_yy[row][warp] = sum_yy;
    }
  }
}

// From the sums and row_max.
template <NormKind kKind, int kRows>
__device__ __forceinline__ RowScale Scale(const PersistentBlock<kRows>& block,
                                          const DecodeArgs& args, int output, int row) {
  const float n = static_cast<float>(args.cols);
  const float max_abs = BitsToFloat(block.row_max[output][row]);
  const float sum_xx = CrossPairTreeSum(block.sum_xx[row]);
  if constexpr (NormTraits<kKind>::kOneNorm) {
    return ScaleOneNorm(sum_xx, max_abs, n, args.eps);
  } else {
    return ScaleTwoNorms(sum_xx, CrossPairTreeSum(block.sum_yy[row]), max_abs, n, args.eps);
  }
}

template <NormKind kKind, bool kPlain, int kRows>
__device__ __forceinline__ void QuantizeAll(
    PersistentBlock<kRows>& block, const DecodeArgs& args, const StageBuffers& buffers,
    const float (&scales)[NormTraits<kKind>::kOutputs][kRows]) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  const int padded = args.padded_cols;
  int32_t sums[kOutputs][kRows] = {};
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * 32 * kQuantizingWarps) {
    float4 y[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float* const from = NormTraits<kKind>::kOneNorm ? buffers.x : buffers.y;
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

// The codes of all rows, from the warps' maxima, and the sums of their norms.
template <NormKind kKind, int kRows>
__device__ __forceinline__ void QuantizeBlock(PersistentBlock<kRows>& block, const DecodeArgs& args,
                                              const StageBuffers& buffers) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  const int thread = threadIdx.x;
  const bool quantizes = thread < 32 * kQuantizingWarps;
  const int from = thread % kPersistentWarps;
  if (!quantizes) Sums<kKind>(block, args, buffers);
  float scales[kOutputs][kRows];
  bool plain = true;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float z = BitsToFloat(__reduce_max_sync(0xffffffffu, block.max_z[row][from]));
    const float bound = NormBound<NormTraits<kKind>::kOneNorm>(z, args.eps);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const uint32_t bits = __reduce_max_sync(0xffffffffu, block.max_t[o][row][from]);
      const float max_t = BitsToFloat(bits);
      if (thread == 0) block.row_max[o][row] = bits;
      scales[o][row] = DivideOrdinary(127.0f, max_t);
      plain = plain && ClampSurelyIdle(max_t, bound);
    }
  }
  if (plain) {
    if (quantizes) QuantizeAll<kKind, true>(block, args, buffers, scales);
    return;
  }
  __syncthreads();
  if (thread < kOutputs * kRows) {
    block.code_scales[thread % kOutputs][thread / kOutputs] =
        Scale<kKind>(block, args, thread % kOutputs, thread / kOutputs).code;
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) scales[o][row] = block.code_scales[o][row];
  }
  if (quantizes) QuantizeAll<kKind, false>(block, args, buffers, scales);
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_PERSISTENT_NORM_CUH_
