// The operations of a step on one instruction set, as a table of functions.
//
// The scalar table is the oracle: the definition of every result. The others perform the same
// IEEE operations in the same order on each element, and exact integer sums in any order, so they
// give the same bits (server/model/NUMERICS.md). All functions are thread-safe and allocate
// nothing.
//
// This header is read by files that are compiled for one instruction set, so it holds plain data
// only: an inline function here could be emitted with instructions that another machine lacks.
#ifndef MMFREE_SERVER_BACKENDS_CPU_KERNELS_H_
#define MMFREE_SERVER_BACKENDS_CPU_KERNELS_H_

#include <cstdint>

namespace mmfree::cpu {

// Most tokens a tile of any instruction set holds, and most tile shapes one has.
inline constexpr int kMaxTileTokens = 64;
inline constexpr int kMaxTileShapes = 12;

// How a tile of tokens lies in a panel of int8 activations. A vector of V bytes (Kernels::
// vector_bytes) holds V / per_vector consecutive columns of each of per_vector tokens; `vectors`
// such vectors stand side by side before the next columns follow. A product broadcasts the weights
// of those columns to every token of a vector. per_vector = 1 is the natural order of one token.
struct TileShape {
  int32_t per_vector;
  int32_t vectors;
};

// A tile of a panel: tokens first .. first + count - 1; count may be below the shape's capacity.
struct Tile {
  int64_t offset;  // bytes from the start of the panel
  int32_t first;
  int32_t count;
  TileShape shape;
};

// Where one token's codes go: column k at codes[k / chunk * stride + k % chunk].
struct CodePlace {
  int8_t* codes;
  int32_t chunk;   // 4, 8, 16, 32 or 64
  int64_t stride;  // chunk when the codes are contiguous
};

// The input of a norm (or of two stacked ones), a row of n floats:
//   y_k = w1 == nullptr ? y[k] : x[k] * w1[k],   t_k = y_k * w2[k];
// with w1 and y both null (one norm) t_k = x[k] * w2[k].
struct NormInput {
  const float* x;
  const float* w1;
  const float* y;
  const float* w2[3];
  int32_t num_w2;  // 1 or 3
  int64_t n;
};

struct NormStats {
  float sum_xx;    // ordered sum of x^2
  float sum_yy;    // ordered sum of y^2; not set for one norm
  float max_t[3];  // max |t| for each w2; NaN elements are passed over
};

// Rows [row_begin, row_end) of a ternary matrix times a panel of tokens:
//   out[t * ld + (row - row_begin)] = float(sum_k w[row][k] q[t][k]) * factors[t],
// or with `accumulate` fma(float(sum), factors[t], out[...]).
struct ProductArgs {
  const uint8_t* codes;  // the whole matrix, server/model/ternary.h
  int64_t padded_cols;
  int64_t row_begin;
  int64_t row_end;
  const int8_t* panel;
  const Tile* tiles;
  int32_t num_tiles;
  const int32_t* sums;   // [tokens] sum of the token's codes
  const float* factors;  // [tokens]
  float* out;
  int64_t ld;
  bool accumulate;
};

// The recurrence of `channels` channels over consecutive tokens of one sequence, and the output
// projection's input y.
struct ScanArgs {
  int64_t tokens;
  int64_t channels;
  const float* forget;  // [tokens, ld_gates] outputs of f_proj and i_proj
  const float* input;
  int64_t ld_gates;
  const float* g;  // [tokens, ld] output of g_proj
  float* y;        // [tokens, ld]
  int64_t ld;
  float* state;              // [channels], updated
  const float* lower_bound;  // [channels]
  const float* g_norm;       // [channels]
};

enum class FloatType : uint8_t { kF32, kF16, kBF16 };

struct Kernels {
  const char* name;
  int32_t vector_bytes;
  TileShape shapes[kMaxTileShapes];  // by rising capacity
  int32_t num_shapes;

  // n values of the given type as floats.
  void (*gather)(FloatType type, const void* values, int64_t n, float* out);
  void (*norm_stats)(const NormInput& in, NormStats* stats);
  // Codes of t under `multiplier` for w2[which], zeros from n to padded_cols. Returns the sum of
  // the codes.
  int32_t (*quantize)(const NormInput& in, int which, float multiplier, int64_t padded_cols,
                      const CodePlace& place);
  void (*product)(const ProductArgs& args);
  void (*scan)(const ScanArgs& args);
  // z[k] = silu(p[k]) * r[k].
  void (*swiglu)(const float* p, const float* r, int64_t n, float* z);
  // Lowest index of the largest logit that is a number; 0 when there is none. n > 0.
  int64_t (*arg_max)(const float* logits, int64_t n);
  // Sum of LogitWeight (server/sampling/sampler.h) over n logits.
  uint64_t (*total_weight)(const float* logits, int64_t n, float max_logit,
                           float inverse_temperature);
};

const Kernels& ScalarKernels();
#if defined(__x86_64__)
const Kernels& Avx2Kernels();
const Kernels& AvxVnniKernels();  // AVX2, and products on AVX-VNNI and GFNI
const Kernels& Avx512Kernels();
const Kernels& GfniKernels();  // AVX-512, and fewer multiplications in products of several tokens
const Kernels& AmxKernels();   // AVX-512, and AMX int8 for products of many tokens
#endif

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_KERNELS_H_
