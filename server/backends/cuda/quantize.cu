// Norm and quantisation of activations: one block of 256 threads a row. A first pass forms the
// ordered sums and the maxima, each thread being one lane of the contract; a second writes the
// codes, four columns a thread.
#include <cuda_runtime.h>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/norm.cuh"
#include "server/backends/cuda/quantize_kinds.cuh"
#include "server/base/numerics.h"

namespace mmfree::cuda {
namespace {

constexpr int kThreads = kNormLanes;
constexpr int kPrefetchBlocks = 4;  // that fetch the weights early

// Columns of one thread that are in flight at a time.
constexpr int kBatch = 5;

// What one thread reads for one of its columns. All of a batch is read before anything is written:
// the compiler cannot know that the outputs do not alias the inputs.
template <NormKind kKind>
struct Column {
  float x;
  float y;            // w1 until it is applied
  float forget;       // kRecurrent
  float input;        // kRecurrent
  float state;        // kRecurrent
  float lower_bound;  // kRecurrent
  float w2[NormTraits<kKind>::kOutputs];

  __device__ __forceinline__ void Load(const QuantizeArgs& args, int64_t row, int32_t k,
                                       const float* states) {
    const int64_t at = row * args.ld_x + k;
    x = args.x[at];
    if constexpr (kKind == NormKind::kScanned) {
      y = args.y[at];
    } else if constexpr (kKind != NormKind::kOneNorm) {
      y = __ldg(args.w1 + k);
    }
    if constexpr (kKind == NormKind::kRecurrent) {
      forget = args.forget[at];
      input = args.input[at];
      state = states[k];
      lower_bound = __ldg(args.lower_bound + k);
    }
#pragma unroll
    for (int o = 0; o < NormTraits<kKind>::kOutputs; ++o) w2[o] = __ldg(args.w2[o] + k);
  }

  // The second norm's input where it is a product or given.
  __device__ __forceinline__ float Y() const {
    if constexpr (kKind == NormKind::kOneNorm) return x;
    if constexpr (kKind == NormKind::kScanned) return y;
    return x * y;
  }
};

// `columns` hold the new states.
__device__ __forceinline__ void Advance(Column<NormKind::kRecurrent> (&columns)[kBatch],
                                        float (&y)[kBatch]) {
  float forget[kBatch];
  float input[kBatch];
  float lower_bound[kBatch];
  float states[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    forget[i] = columns[i].forget;
    input[i] = columns[i].input;
    lower_bound[i] = columns[i].lower_bound;
    states[i] = columns[i].state;
  }
  AdvanceBatch(forget, input, lower_bound, states, y);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    columns[i].state = states[i];
    y[i] = (columns[i].x * columns[i].y) * y[i];
  }
}

template <NormKind kKind>
__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const __grid_constant__ QuantizeArgs args) {
  constexpr int kOutputs = NormTraits<kKind>::kOutputs;
  constexpr bool kOneNorm = NormTraits<kKind>::kOneNorm;
  extern __shared__ float y_row[];  // [padded_cols]
  __shared__ NormPartials<kOutputs> partials;
  __shared__ CodeScale scales[kOutputs];

  // The weights do not depend on the previous kernel; in a decode step they come from memory.
  if (blockIdx.x < kPrefetchBlocks) {
    constexpr int kLineFloats = 32;
    for (int32_t k = kLineFloats * threadIdx.x; k < args.cols; k += kLineFloats * kThreads) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) PrefetchL2(args.w2[o] + k);
      if (args.w1 != nullptr) PrefetchL2(args.w1 + k);
      if (args.lower_bound != nullptr) PrefetchL2(args.lower_bound + k);
    }
  }
  WaitForPrevious();
  AllowNext();
  const int32_t row = blockIdx.x;
  if (args.row_offset + row >= *args.num_rows) return;
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t source =
      args.gather != nullptr ? args.gather[args.row_offset + row].token : int64_t{row};
  float* states = nullptr;
  if constexpr (kKind == NormKind::kRecurrent) {
    states = args.states + args.rows[row].slot * args.state_stride;
  }

  float sum_xx = 0.0f;
  float sum_yy = 0.0f;
  uint32_t max_bits[kOutputs] = {};
  for (int32_t base = thread; base < args.cols; base += kBatch * kThreads) {
    Column<kKind> columns[kBatch] = {};
    float batch_y[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t k = base + i * kThreads;
      if (k < args.cols) columns[i].Load(args, source, k, states);
    }
    if constexpr (kKind == NormKind::kRecurrent) {
      Advance(columns, batch_y);
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) batch_y[i] = columns[i].Y();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t k = base + i * kThreads;
      if (k >= args.cols) break;
      const Column<kKind>& column = columns[i];
      const float y = batch_y[i];
      if constexpr (kKind == NormKind::kRecurrent) states[k] = column.state;
      sum_xx = fmaf(column.x, column.x, sum_xx);
      if constexpr (!kOneNorm) sum_yy = fmaf(y, y, sum_yy);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        max_bits[o] = max(max_bits[o], AbsBits(y * column.w2[o]));
      }
      y_row[k] = y;
    }
  }
  for (int32_t k = args.cols + thread; k < args.padded_cols; k += kThreads) y_row[k] = 0.0f;
  StorePartials<kOutputs>(sum_xx, sum_yy, max_bits, warp, lane, &partials);
  __syncthreads();

  const float n = static_cast<float>(args.cols);
  if (thread < kOutputs) scales[thread] = CodeScaleOf<kOneNorm>(partials, thread, n, args.eps);
  __syncthreads();
  bool plain = true;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) plain = plain && scales[o].plain;

  int32_t code_sum[kOutputs] = {};
  const int64_t block_stride = int64_t{args.stride} * kColumnBlock;
  const int64_t matrix_stride = block_stride * (args.padded_cols / kColumnBlock);
  constexpr int kQuads = kOutputs == 1 ? 3 : 1;  // of columns, in flight at a time
  for (int32_t base = 4 * thread; base < args.padded_cols; base += kQuads * 4 * kThreads) {
    float4 y[kQuads];
    float4 w[kQuads][kOutputs];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int32_t k = base + i * 4 * kThreads;
      if (k >= args.padded_cols) break;
      y[i] = *reinterpret_cast<const float4*>(y_row + k);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        w[i][o] = __ldg(reinterpret_cast<const float4*>(args.w2[o] + k));
      }
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int32_t k = base + i * 4 * kThreads;
      if (k >= args.padded_cols) break;
      const int32_t chunk = (k % kColumnBlock) / 16;
      int8_t* const at = args.q + k / kColumnBlock * block_stride + int64_t{row} * kColumnBlock +
                         ((chunk ^ (row & 7)) * 16 + k % 16);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        *reinterpret_cast<uint32_t*>(at + o * matrix_stride) =
            plain ? QuantizeQuad<true>(y[i], w[i][o], scales[o].scale, &code_sum[o])
                  : QuantizeQuad<false>(y[i], w[i][o], scales[o].scale, &code_sum[o]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int32_t sum = __reduce_add_sync(0xffffffffu, code_sum[o]);
    if (lane == 0) partials.code_sum[o][warp] = sum;
  }
  __syncthreads();
  if (thread < kOutputs) {
    int32_t sum = 0;
    for (int w = 0; w < kNormWarps; ++w) sum += partials.code_sum[thread][w];
    args.meta[int64_t{thread} * args.stride + row] = {
        ScaleOf<kOneNorm>(partials, thread, n, args.eps).out, sum};
  }
}

template <NormKind kKind>
cudaError_t LaunchKind(const QuantizeArgs& args, int32_t max_rows, const LaunchContext& context) {
  return Launch<QuantizeKernel<kKind>>(context, dim3(max_rows), dim3(kThreads),
                                       args.padded_cols * sizeof(float), args);
}

// As measured (decision 0208): quantize_row.cu ends a row sooner, but holds so many threads for it
// that few long rows share a multiprocessor, which counts when there are many.
bool RowsAreQuicker(const QuantizeArgs& args, int32_t max_rows, const LaunchContext& context) {
  if (!context.hopper || args.padded_cols > kMaxQuantizeRowCols) return false;
  return max_rows <= 256 || args.padded_cols <= (args.kind == NormKind::kOneNorm ? 5632 : 2048);
}

}  // namespace

int64_t MaxQuantizeCols(int64_t shared_bytes) {
  const int64_t floats = (shared_bytes - int64_t{sizeof(NormPartials<3>)}) / int64_t{sizeof(float)};
  return floats / kColumnBlock * kColumnBlock;
}

cudaError_t LaunchQuantize(const QuantizeArgs& args, int32_t max_rows,
                           const LaunchContext& context) {
  if (RowsAreQuicker(args, max_rows, context)) return LaunchQuantizeRow(args, max_rows, context);
  return LaunchForKind(args.kind, [&](auto kind) {
    return LaunchKind<decltype(kind)::value>(args, max_rows, context);
  });
}

}  // namespace mmfree::cuda
