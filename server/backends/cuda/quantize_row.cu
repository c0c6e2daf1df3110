// Norm and quantisation of activations: one block a row, each thread a few quads of columns that it
// keeps in registers from the first read to the codes.
//
// The codes need the maxima of a row, not the ordered sums of its norms. So they are written as
// soon as the maxima are known, and the sums, which only the scale of the sums of products needs,
// are formed from shared memory afterwards; unless the clamp of tiny rows may act.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "server/backends/cuda/batch_math.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/quantize_kinds.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {
namespace {

constexpr int kMaxWarps = 32;
constexpr float4 kZero = {0.0f, 0.0f, 0.0f, 0.0f};

// Two blocks fit a multiprocessor where a thread has one quad and more than one vector to read.
template <NormKind kKind, int kQuads>
inline constexpr int kMaxThreads = kQuads == 1 && kKind != NormKind::kOneNorm ? 672 : 1024;
template <NormKind kKind, int kQuads>
inline constexpr int kMinBlocks = kQuads == 1 && kKind != NormKind::kOneNorm ? 2 : 1;

template <int kOutputs>
struct Shared {
  uint32_t max_z[kMaxWarps];
  uint32_t max_t[kOutputs][kMaxWarps];
  int32_t code_sums[kOutputs];
  NormPartials<kOutputs> partials;  // the sums, and the maxima of the whole row as those of warp 0
  float scales[kOutputs];           // where the clamp may act
};

__device__ __forceinline__ float4 LoadQuad(const float* from) {
  return __ldcg(reinterpret_cast<const float4*>(from));
}

// The states at columns k .. k + 3 of a row of `cols`, which begin at any multiple of four bytes.
__device__ __forceinline__ float4 LoadStates(const float* states, int k, int cols, bool aligned) {
  if (aligned) return k < cols ? LoadQuad(states + k) : kZero;
  float4 quad = kZero;
  if (k < cols) quad.x = __ldcg(states + k);
  if (k + 1 < cols) quad.y = __ldcg(states + k + 1);
  if (k + 2 < cols) quad.z = __ldcg(states + k + 2);
  if (k + 3 < cols) quad.w = __ldcg(states + k + 3);
  return quad;
}
__device__ __forceinline__ void StoreStates(float* states, int k, int cols, bool aligned,
                                            const float4& quad) {
  if (aligned) {
    if (k < cols) *reinterpret_cast<float4*>(states + k) = quad;
    return;
  }
  if (k < cols) states[k] = quad.x;
  if (k + 1 < cols) states[k + 1] = quad.y;
  if (k + 2 < cols) states[k + 2] = quad.z;
  if (k + 3 < cols) states[k + 3] = quad.w;
}

// AdvanceBatch for a quad of columns.
__device__ __forceinline__ float4 Advance(const float4& forget, const float4& input,
                                          const float4& lower_bound, float4* state) {
  float f[4] = {forget.x, forget.y, forget.z, forget.w};
  float i[4] = {input.x, input.y, input.z, input.w};
  const float bound[4] = {lower_bound.x, lower_bound.y, lower_bound.z, lower_bound.w};
  float s[4] = {state->x, state->y, state->z, state->w};
  float gate[4];
  AdvanceBatch(f, i, bound, s, gate);
  *state = make_float4(s[0], s[1], s[2], s[3]);
  return make_float4(gate[0], gate[1], gate[2], gate[3]);
}

template <bool kPlain>
__device__ __forceinline__ uint32_t Codes(const float4& t, float scale, int32_t* sum) {
  const uint32_t codes = PackCodes(Code<kPlain>(t.x, scale), Code<kPlain>(t.y, scale),
                                   Code<kPlain>(t.z, scale), Code<kPlain>(t.w, scale));
  *sum = __dp4a(static_cast<int32_t>(codes), 0x01010101, *sum);
  return codes;
}

// A thread's quads of a row: those at columns 4 * (thread + n * threads).
template <NormKind kKind, int kQuads>
class RowQuads {
 public:
  static constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  static constexpr bool kOneNorm = NormTraits<kKind>::kOneNorm;

  __device__ __forceinline__ explicit RowQuads(const QuantizeArgs& args) : args_(args) {}

  __device__ __forceinline__ int Column(int n) const {
    return 4 * static_cast<int>(threadIdx.x + n * blockDim.x);
  }

  // What does not depend on the previous kernel.
  __device__ __forceinline__ void LoadWeights(const float* states, bool aligned) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int k = Column(n);
      const bool valid = k < args_.padded_cols;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        t_[o][n] = valid ? __ldg(reinterpret_cast<const float4*>(args_.w2[o] + k)) : kZero;
      }
      if constexpr (NormTraits<kKind>::kHasW1) {
        y_[n] = valid ? __ldg(reinterpret_cast<const float4*>(args_.w1 + k)) : kZero;
      }
      if constexpr (NormTraits<kKind>::kRecurrent) {
        bound_[n] = valid ? __ldg(reinterpret_cast<const float4*>(args_.lower_bound + k)) : kZero;
        state_[n] = LoadStates(states, k, args_.cols, aligned);
      }
    }
  }

  // Reads the row, leaves x and y in shared memory and the products in the registers; returns the
  // maxima.
  __device__ __forceinline__ void LoadRow(int64_t source, float root_eps, float* states,
                                          bool aligned, float* shared_x, float* max_z,
                                          uint32_t (&max_t)[kOutputs]) {
    float4 x[kQuads];
    float4 forget[kQuads];
    float4 input[kQuads];
    const int64_t row = source * args_.ld_x;
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int k = Column(n);
      const bool valid = k < args_.ld_x;
      x[n] = valid ? LoadQuad(args_.x + row + k) : kZero;
      if constexpr (kKind == NormKind::kScanned) {
        y_[n] = valid ? LoadQuad(args_.y + row + k) : kZero;
      }
      if constexpr (NormTraits<kKind>::kRecurrent) {
        forget[n] = valid ? LoadQuad(args_.forget + row + k) : kZero;
        input[n] = valid ? LoadQuad(args_.input + row + k) : kZero;
      }
    }
    float* const shared_y = shared_x + args_.padded_cols;
    // The recurrence needs the registers: before it x is done with, and g times its norm's weights
    // waits in shared memory.
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int k = Column(n);
      if (k >= args_.padded_cols) break;
      if constexpr (kOneNorm) {
        y_[n] = x[n];
      } else if constexpr (NormTraits<kKind>::kHasW1) {
        y_[n] = Times(x[n], y_[n]);
      }
      if constexpr (NormTraits<kKind>::kRecurrent) {
        *reinterpret_cast<float4*>(shared_y + k) = y_[n];
      }
      *reinterpret_cast<float4*>(shared_x + k) = x[n];
      *max_z = fmaxf(*max_z, kOneNorm ? MaxAbs(x[n]) : root_eps * MaxAbs(x[n]));
    }
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int k = Column(n);
      if (k >= args_.padded_cols) break;
      if constexpr (NormTraits<kKind>::kRecurrent) {
        const float4 gate = Advance(forget[n], input[n], bound_[n], &state_[n]);
        y_[n] = Times(*reinterpret_cast<const float4*>(shared_y + k), gate);
        StoreStates(states, k, args_.cols, aligned, state_[n]);
      }
      if constexpr (!kOneNorm) {
        *reinterpret_cast<float4*>(shared_y + k) = y_[n];
        *max_z = fmaxf(*max_z, MaxAbs(y_[n]));
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        t_[o][n] = Times(y_[n], t_[o][n]);
        max_t[o] = max(max_t[o], MaxAbsBits(t_[o][n]));
      }
    }
  }

  template <bool kPlain>
  __device__ __forceinline__ void Quantize(int32_t row, const float (&scales)[kOutputs],
                                           int32_t (&code_sums)[kOutputs]) const {
    const int64_t block_stride = int64_t{args_.stride} * kColumnBlock;
    const int64_t matrix_stride = block_stride * (args_.padded_cols / kColumnBlock);
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int k = Column(n);
      if (k >= args_.padded_cols) break;
      const int chunk = k % kColumnBlock / 16;
      int8_t* const at = args_.q + k / kColumnBlock * block_stride + int64_t{row} * kColumnBlock +
                         ((chunk ^ (row & 7)) * 16 + k % 16);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        *reinterpret_cast<uint32_t*>(at + o * matrix_stride) =
            Codes<kPlain>(t_[o][n], scales[o], &code_sums[o]);
      }
    }
  }

 private:
  const QuantizeArgs& args_;
  float4 t_[kOutputs][kQuads];  // w2; then y * w2
  float4 y_[kQuads];            // w1 where there is one; then y
  float4 bound_[kQuads];        // kRecurrent
  float4 state_[kQuads];        // kRecurrent
};

// The ordered sums of the row's norms, by the first kNormLanes threads.
template <bool kOneNorm, int kOutputs>
__device__ __forceinline__ void Sums(const QuantizeArgs& args, const float* x,
                                     NormPartials<kOutputs>* partials) {
  const float* const y = x + args.padded_cols;
  float sum_xx = 0.0f;
  float sum_yy = 0.0f;
#pragma unroll 5
  for (int k = static_cast<int>(threadIdx.x); k < args.cols; k += kNormLanes) {
    sum_xx = fmaf(x[k], x[k], sum_xx);
    if constexpr (!kOneNorm) sum_yy = fmaf(y[k], y[k], sum_yy);
  }
  sum_xx = WarpTreeSum(sum_xx);
  if constexpr (!kOneNorm) sum_yy = WarpTreeSum(sum_yy);
  if (threadIdx.x % 32 == 0) {
    partials->xx[threadIdx.x / 32] = sum_xx;
    partials->yy[threadIdx.x / 32] = sum_yy;
  }
}

// The exact scale of an output whose row has the largest product `max_abs`.
template <bool kOneNorm, int kOutputs>
__device__ __forceinline__ RowScale ExactScale(const QuantizeArgs& args,
                                               const NormPartials<kOutputs>& partials, int output) {
  const float n = static_cast<float>(args.cols);
  const float max_abs = BitsToFloat(partials.max_bits[output][0]);
  const float sum_xx = CrossWarpTreeSum(partials.xx);
  if constexpr (kOneNorm) {
    return ScaleOneNorm(sum_xx, max_abs, n, args.eps);
  } else {
    return ScaleTwoNorms(sum_xx, CrossWarpTreeSum(partials.yy), max_abs, n, args.eps);
  }
}

template <NormKind kKind, int kQuads>
__global__ void __launch_bounds__(kMaxThreads<kKind, kQuads>, kMinBlocks<kKind, kQuads>)
    QuantizeRowKernel(const __grid_constant__ QuantizeArgs args, float root_eps) {
  using T = NormTraits<kKind>;
  constexpr int kOutputs = T::kOutputs;
  extern __shared__ float4 dynamic_shared[];  // [padded_cols] of x, and but for one norm of y
  float* const shared_x = reinterpret_cast<float*>(dynamic_shared);
  __shared__ Shared<kOutputs> shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  const int32_t row = static_cast<int32_t>(blockIdx.x);

  // The step's inputs and the states come from kernels so long before that they have ended when
  // this one starts (README.md).
  RowQuads<kKind, kQuads> quads(args);
  const bool exists = args.row_offset + row < __ldcg(args.num_rows);
  int64_t source = row;
  if (args.gather != nullptr && exists) source = __ldcg(&args.gather[args.row_offset + row].token);
  float* states = nullptr;
  bool aligned = true;
  if constexpr (T::kRecurrent) {
    if (exists) states = args.states + __ldcg(&args.rows[row].slot) * args.state_stride;
    aligned = args.cols % 4 == 0;
  }
  if (exists) quads.LoadWeights(states, aligned);
  WaitForPrevious();
  AllowNext();
  if (!exists) return;

  float max_z = 0.0f;
  uint32_t max_t[kOutputs] = {};
  quads.LoadRow(source, root_eps, states, aligned, shared_x, &max_z, max_t);
  const uint32_t z_bits = __reduce_max_sync(0xffffffffu, FloatToBits(max_z));
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) max_t[o] = __reduce_max_sync(0xffffffffu, max_t[o]);
  if (lane == 0) {
    shared.max_z[thread / 32] = z_bits;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) shared.max_t[o][thread / 32] = max_t[o];
  }
  if (thread < kOutputs) shared.code_sums[thread] = 0;
  __syncthreads();

  const int from = min(lane, num_warps - 1);
  const float z = BitsToFloat(__reduce_max_sync(0xffffffffu, shared.max_z[from]));
  const float bound = NormBound<T::kOneNorm>(z, args.eps);
  float scales[kOutputs];
  bool plain = true;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const uint32_t bits = __reduce_max_sync(0xffffffffu, shared.max_t[o][from]);
    const float largest = BitsToFloat(bits);
    if (thread == 0) shared.partials.max_bits[o][0] = bits;
    scales[o] = DivideOrdinary(127.0f, largest);
    plain = plain && ClampSurelyIdle(largest, bound);
  }
  int32_t code_sums[kOutputs] = {};
  if (plain) {
    quads.template Quantize<true>(row, scales, code_sums);
    if (thread < kNormLanes) Sums<T::kOneNorm>(args, shared_x, &shared.partials);
  } else {
    if (thread < kNormLanes) Sums<T::kOneNorm>(args, shared_x, &shared.partials);
    __syncthreads();
    if (thread < kOutputs) {
      shared.scales[thread] = ExactScale<T::kOneNorm>(args, shared.partials, thread).code;
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) scales[o] = shared.scales[o];
    quads.template Quantize<false>(row, scales, code_sums);
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int32_t sum = __reduce_add_sync(0xffffffffu, code_sums[o]);
    if (lane == 0) atomicAdd(&shared.code_sums[o], sum);
  }
  __syncthreads();
  if (thread < kOutputs) {
    args.meta[int64_t{thread} * args.stride + row] = {
        ExactScale<T::kOneNorm>(args, shared.partials, thread).out, shared.code_sums[thread]};
  }
}

// Threads of a block with so many quads each: at least kNormLanes, whole warps.
int64_t ThreadsFor(int64_t padded_cols, int quads) {
  return std::max<int64_t>(kNormLanes, RoundUp(CeilDiv(padded_cols / 4, quads), 32));
}

template <NormKind kKind, int kQuads>
cudaError_t LaunchQuads(const QuantizeArgs& args, int32_t max_rows, const LaunchContext& context) {
  const int64_t threads = ThreadsFor(args.padded_cols, kQuads);
  if (threads > kMaxThreads<kKind, kQuads>) return cudaErrorInvalidValue;
  const int64_t vectors = kKind == NormKind::kOneNorm ? 1 : 2;
  // Rounded up, with room for the rounding of products.
  const float root_eps = std::sqrt(args.eps) * 1.0001f;
  return Launch<QuantizeRowKernel<kKind, kQuads>>(
      context, dim3(static_cast<uint32_t>(max_rows)), dim3(static_cast<uint32_t>(threads)),
      static_cast<size_t>(vectors * args.padded_cols * 4), args, root_eps);
}

template <NormKind kKind>
cudaError_t LaunchKind(const QuantizeArgs& args, int32_t max_rows, const LaunchContext& context) {
  return ThreadsFor(args.padded_cols, 1) <= kMaxThreads<kKind, 1>
             ? LaunchQuads<kKind, 1>(args, max_rows, context)
             : LaunchQuads<kKind, 2>(args, max_rows, context);
}

}  // namespace

cudaError_t LaunchQuantizeRow(const QuantizeArgs& args, int32_t max_rows,
                              const LaunchContext& context) {
  return LaunchForKind(args.kind, [&](auto kind) {
    return LaunchKind<decltype(kind)::value>(args, max_rows, context);
  });
}

}  // namespace mmfree::cuda
