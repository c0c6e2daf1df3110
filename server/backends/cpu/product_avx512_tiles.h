// Ternary products of tiles of several tokens on AVX-512 VNNI, for product_avx512.cc and
// product_gfni.cc, which differ in how the four rows of a byte are told apart.
//
// vpdpbusd multiplies 64 unsigned bytes with 64 signed activations and adds groups of four products
// into 16 int32 sums. Its rate is the limit of these products, so a row group is multiplied a few
// times whole rather than once for each of its rows. A `Rows` type says how:
//
//   kSums                 multiplications for the four rows of a group
//   kMaxColumns           most columns after which the rows have to be separated
//   Operands(b, bytes)    from the stored codes the unsigned bytes of each multiplication
//   Separate(sums, rows)  the rows' own sums of codes w + 1, from those of the multiplications
//
// Only for files compiled for AVX-512; everything is static, so nothing of it is shared with
// others.
#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_TILES_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_TILES_H_

#include <immintrin.h>

#include <cstdint>

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::avx512 {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kQuadTokens = 4;    // tokens of a "quad", a vector with the rows of a group for each
constexpr int kOutputGroups = 4;  // row groups whose outputs are written together: a vector a token

constexpr int64_t MinInt(int64_t a, int64_t b) { return a < b ? a : b; }

// Fetches codes ahead of those at `codes`: `ahead` bytes from there into L1, and four times as far
// from memory into L2. The products of one token read memory at 118 % of plain loops' bandwidth
// with both and at 83 % with the near ones alone (2.7B, two threads of a Xeon).
inline void FetchAhead(const uint8_t* codes, int64_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes + 4 * ahead), _MM_HINT_T1);
}
constexpr int64_t kAhead = 2048;  // of codes that are read one after the other

// `chunk` bytes at p, repeated to fill a vector.
template <int chunk>
__m512i Broadcast(const uint8_t* p) {
  if constexpr (chunk == 64) return _mm512_loadu_si512(p);
  if constexpr (chunk == 32) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  if constexpr (chunk == 16) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  if constexpr (chunk == 8) {
    int64_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return _mm512_set1_epi64(word);
  }
  if constexpr (chunk == 4) {
    int word;
    __builtin_memcpy(&word, p, sizeof(word));
    return _mm512_set1_epi32(word);
  }
}

template <int per_vector, int vectors>
constexpr int kQuads = (per_vector * vectors + kQuadTokens - 1) / kQuadTokens;

// Vectors that the sums of one row with the tokens of a tile take: with few tokens a vector,
// partial sums are added until each 128-bit lane is a token.
template <int per_vector, int vectors>
constexpr int kFolded = per_vector < kQuadTokens ? kQuads<per_vector, vectors> : vectors;

// The sums of a row group with the tokens of a tile: four partial ones of each token for up to four
// tokens a vector, two for eight, one for sixteen.
template <int per_vector, int vectors>
struct RowSums {
  __m512i sum[4][kFolded<per_vector, vectors>];
};

// For four rows with four partial sums a token (one 128-bit lane), the four rows of that token.
inline __m512i SumLanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Adds neighbouring 128-bit lanes: (x0+x1, x2+x3, y0+y1, y2+y3).
inline __m512i SumLanePairs(__m512i x, __m512i y) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// Adds the partial sums of one row, sum[vector], as far as RowSums has them.
template <int per_vector, int vectors>
void Fold(const __m512i* sum, __m512i* folded) {
  const __m512i zero = _mm512_setzero_si512();
  if constexpr (per_vector >= kQuadTokens) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) folded[v] = sum[v];
  } else if constexpr (per_vector == 2) {
    folded[0] = SumLanePairs(sum[0], sum[1]);
    if constexpr (vectors > 2) folded[1] = SumLanePairs(sum[2], vectors > 3 ? sum[3] : zero);
  } else {
    const __m512i low = SumLanePairs(sum[0], vectors > 1 ? sum[1] : zero);
    folded[0] = SumLanePairs(low, vectors > 2 ? SumLanePairs(sum[2], sum[3]) : zero);
  }
}

// Adds the partial sums of each row and token of vector v of the sums: quads[q] holds the four rows
// of the tokens QuadToken(q, 0 .. 3).
template <int per_vector, int vectors>
void QuadSums(const RowSums<per_vector, vectors>& acc, int v, __m512i* quads) {
  const __m512i a = acc.sum[0][v];
  const __m512i b = acc.sum[1][v];
  const __m512i c = acc.sum[2][v];
  const __m512i d = acc.sum[3][v];
  if constexpr (per_vector <= kQuadTokens) {
    quads[0] = SumLanes(a, b, c, d);
    return;
  }
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
  const __m512i low_even = _mm512_unpacklo_epi64(ab_low, cd_low);
  const __m512i low_odd = _mm512_unpackhi_epi64(ab_low, cd_low);
  const __m512i high_even = _mm512_unpacklo_epi64(ab_high, cd_high);
  const __m512i high_odd = _mm512_unpackhi_epi64(ab_high, cd_high);
  if constexpr (per_vector == 8) {
    // Each lane: two partial sums of an even token, two of an odd one.
    quads[0] = _mm512_add_epi32(low_even, low_odd);
    quads[1] = _mm512_add_epi32(high_even, high_odd);
  } else if constexpr (per_vector == 16) {
    // Every element is a token of its own.
    quads[0] = low_even;
    quads[1] = low_odd;
    quads[2] = high_even;
    quads[3] = high_odd;
  }
}

// Quads of a vector of sums, and where in the vector the token of a quad's lane is.
template <int per_vector>
constexpr int kVectorQuads = per_vector <= kQuadTokens ? 1 : per_vector / kQuadTokens;
template <int per_vector>
constexpr int QuadToken(int q, int lane) {
  return lane * kVectorQuads<per_vector> + q;
}

// Writes one token's outputs for those of 16 rows that `rows` names, from their sums of codes w
// + 1.
inline void StoreToken(const ProductArgs& args, int64_t token, int64_t column, __mmask16 rows,
                       __m512i sums) {
  float* const out = args.out + token * args.ld + column;
  const __m512 value =
      _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(args.sums[token])));
  const __m512 factor = _mm512_set1_ps(args.factors[token]);
  _mm512_mask_storeu_ps(out, rows,
                        args.accumulate
                            ? _mm512_fmadd_ps(value, factor, _mm512_maskz_loadu_ps(rows, out))
                            : _mm512_mul_ps(value, factor));
}

// Writes the outputs of up to kOutputGroups row groups, acc[groups], and the tokens of a tile.
template <int per_vector, int vectors>
__attribute__((noinline)) void Finish(const ProductArgs& args, const Tile& tile, int64_t group,
                                      int groups, const RowSums<per_vector, vectors>* acc) {
  const int64_t column = group * 4 - args.row_begin;
  const int64_t begin = column < 0 ? -column : 0;
  const int64_t end = MinInt(4 * groups, args.row_end - group * 4);
  const __mmask16 rows = static_cast<__mmask16>((1u << end) - (1u << begin));
  constexpr int kCount = kVectorQuads<per_vector>;
  constexpr int kTokens = kCount * kQuadTokens;
#pragma GCC unroll 4
  for (int v = 0; v < kFolded<per_vector, vectors>; ++v) {
    __m512i quads[kOutputGroups][kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kOutputGroups; ++g) {
      QuadSums<per_vector, vectors>(acc[g < groups ? g : 0], v, quads[g]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) {
      const __m512i low01 = _mm512_shuffle_i32x4(quads[0][q], quads[1][q], 0x44);
      const __m512i low23 = _mm512_shuffle_i32x4(quads[2][q], quads[3][q], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(quads[0][q], quads[1][q], 0xee);
      const __m512i high23 = _mm512_shuffle_i32x4(quads[2][q], quads[3][q], 0xee);
      const __m512i sums[kQuadTokens] = {
          _mm512_shuffle_i32x4(low01, low23, 0x88), _mm512_shuffle_i32x4(low01, low23, 0xdd),
          _mm512_shuffle_i32x4(high01, high23, 0x88), _mm512_shuffle_i32x4(high01, high23, 0xdd)};
#pragma GCC unroll 4
      for (int lane = 0; lane < kQuadTokens; ++lane) {
        const int token = v * kTokens + QuadToken<per_vector>(q, lane);
        if (token >= tile.count) continue;
        StoreToken(args, tile.first + token, column, rows, sums[lane]);
      }
    }
  }
}

// *sum += bytes x. GCC 12 would keep two sets of accumulators in innermost loops and copy one to
// the other in every step, and load x again for each multiplication: so the instruction by its
// name, and a point at the end of a step at which every sum is where it was.
inline void MultiplyAdd(__m512i bytes, __m512i x, __m512i* sum) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(x));
}
inline void KeepInPlace(__m512i* sum) { __asm__("" : "+v"(*sum)); }

// Steps that are accumulated before the rows are separated: no more than 16 KiB of activations, and
// no more than Rows::kMaxColumns columns for each of the folded sums.
template <typename Rows, int per_vector>
constexpr int64_t kSteps = MinInt(64, Rows::kMaxColumns / 4 * MinInt(per_vector, kQuadTokens) /
                                          kQuadTokens);

// The sums of `steps` steps of a row group and a tile, more than none and whole cache lines of
// codes, added to *acc, or put there when they are the first. A function of its own, so that its
// registers are its own.
template <typename Rows, int per_vector, int vectors>
__attribute__((noinline)) void Accumulate(const uint8_t* codes, const int8_t* panel, int64_t steps,
                                          int64_t ahead, bool first,
                                          RowSums<per_vector, vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kUnroll = per_vector == 1 ? 1 : 2;
  constexpr int kFold = kFolded<per_vector, vectors>;
  const Rows rows;
  __m512i sum[Rows::kSums * vectors];  // [kSums][vectors]
#pragma GCC unroll 16
  for (__m512i& zero : sum) zero = _mm512_setzero_si512();
  const uint8_t* const end = codes + steps * kChunk;
  do {
    FetchAhead(codes, ahead);
#pragma GCC unroll 2
    for (int step = 0; step < kUnroll; ++step) {
      __m512i bytes[Rows::kSums];
      rows.Operands(Broadcast<kChunk>(codes + step * kChunk), bytes);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const __m512i x = _mm512_loadu_si512(panel + (step * vectors + v) * kVectorBytes);
#pragma GCC unroll 4
        for (int i = 0; i < Rows::kSums; ++i) MultiplyAdd(bytes[i], x, sum + i * vectors + v);
      }
    }
    panel += kUnroll * vectors * kVectorBytes;
    codes += kUnroll * kChunk;
#pragma GCC unroll 16
    for (__m512i& kept : sum) KeepInPlace(&kept);
  } while (codes != end);
#pragma GCC unroll 16
  for (__m512i& kept : sum) KeepInPlace(&kept);

  __m512i folded[Rows::kSums * kFold];
#pragma GCC unroll 4
  for (int i = 0; i < Rows::kSums; ++i) {
    Fold<per_vector, vectors>(sum + i * vectors, folded + i * kFold);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kFold; ++v) {
    __m512i sums[Rows::kSums];
#pragma GCC unroll 4
    for (int i = 0; i < Rows::kSums; ++i) sums[i] = folded[i * kFold + v];
    __m512i row[4];
    Rows::Separate(sums, row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      acc->sum[r][v] = first ? row[r] : _mm512_add_epi32(acc->sum[r][v], row[r]);
    }
  }
}

// A tile of several tokens. Blocks of columns keep the activations in L1 for a few row groups.
template <typename Rows, int per_vector, int vectors>
void ManyTokens(const ProductArgs& args, const Tile& tile) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kMaxGroups = 16;
  constexpr int64_t kBlock = kSteps<Rows, per_vector>;
  const int64_t steps = args.padded_cols / kChunk;
  const int64_t last = (args.row_end + 3) / 4;
  const int64_t block_groups = steps <= kBlock ? kOutputGroups : kMaxGroups;
  // In blocks of columns it is the same columns of other row groups that come next.
  const int64_t ahead = steps <= kBlock ? kAhead : args.padded_cols;
  for (int64_t group = args.row_begin / 4; group < last; group += block_groups) {
    const int groups = static_cast<int>(MinInt(block_groups, last - group));
    RowSums<per_vector, vectors> acc[kMaxGroups];
    for (int64_t step = 0; step < steps; step += kBlock) {
      const int8_t* panel = args.panel + tile.offset + step * vectors * kVectorBytes;
      const int64_t count = MinInt(kBlock, steps - step);
      for (int g = 0; g < groups; ++g) {
        Accumulate<Rows, per_vector, vectors>(
            args.codes + (group + g) * args.padded_cols + step * kChunk, panel, count, ahead,
            step == 0, acc + g);
      }
    }
    for (int g = 0; g < groups; g += kOutputGroups) {
      const int count = static_cast<int>(MinInt(kOutputGroups, groups - g));
      Finish<per_vector, vectors>(args, tile, group + g, count, acc + g);
    }
  }
}

// The product with one tile of 2 to kMaxTileTokens tokens, in any shape of the AVX-512 tables.
template <typename Rows>
void TileProduct(const ProductArgs& args, const Tile& tile) {
  switch (tile.shape.per_vector * tile.shape.vectors) {
    case 2:
      return ManyTokens<Rows, 1, 2>(args, tile);
    case 4:
      return ManyTokens<Rows, 1, 4>(args, tile);
    case 6:
      return ManyTokens<Rows, 2, 3>(args, tile);
    case 8:
      return ManyTokens<Rows, 2, 4>(args, tile);
    case 12:
      return ManyTokens<Rows, 4, 3>(args, tile);
    case 16:
      return ManyTokens<Rows, 4, 4>(args, tile);
    case 24:
      return ManyTokens<Rows, 8, 3>(args, tile);
    case 32:
      return ManyTokens<Rows, 8, 4>(args, tile);
    case 48:
      return ManyTokens<Rows, 16, 3>(args, tile);
    default:
      return ManyTokens<Rows, 16, 4>(args, tile);
  }
}

}  // namespace
}  // namespace mmfree::cpu::avx512

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_TILES_H_
