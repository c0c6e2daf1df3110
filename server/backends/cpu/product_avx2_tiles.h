// What the ternary products of product_avx2.cc and product_avx_vnni.cc share: reading the codes of
// a row group, and making outputs of the sums of two.
//
// Only for files compiled for AVX2; everything is static, so nothing of it is shared with others.
#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_TILES_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_TILES_H_

#include <immintrin.h>

#include <cstdint>

#include "server/backends/cpu/avx2_math.h"
#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::avx2 {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kLanes = 2;         // 128-bit ones of a vector
constexpr int kOutputGroups = 2;  // row groups whose outputs are written together: a vector a token

// Fetches codes ahead of those at `codes`: `ahead` bytes from there into L1, and four times as far
// from memory into L2.
inline void FetchAhead(const uint8_t* codes, int64_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes + 4 * ahead), _MM_HINT_T1);
}
constexpr int64_t kAhead = 2048;  // of codes that are read one after the other

inline __m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// `chunk` bytes at p, repeated to fill a vector.
template <int chunk>
__m256i Broadcast(const uint8_t* p) {
  if constexpr (chunk == 32) return Load(p);
  if constexpr (chunk == 16) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  if constexpr (chunk == 8) {
    int64_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return _mm256_set1_epi64x(word);
  }
  if constexpr (chunk == 4) {
    int word;
    __builtin_memcpy(&word, p, sizeof(word));
    return _mm256_set1_epi32(word);
  }
}

// The sums of a row group with the tokens of a tile: kVectorBytes / 4 / per_vector partial ones of
// each token side by side.
template <int vectors>
struct RowSums {
  __m256i sum[4][vectors];
};

// A "quad" holds in each 128-bit lane the four rows of one token. Quads of a vector of sums:
template <int per_vector>
constexpr int kVectorQuads = per_vector <= kLanes ? 1 : per_vector / kLanes;

// Adds the partial sums of each row and token of vector v of the sums: lane l of quads[q] holds the
// four rows of token l * kVectorQuads + q; with one token a vector, each lane half of its sums.
template <int per_vector, int vectors>
void QuadSums(const RowSums<vectors>& acc, int v, __m256i* quads) {
  const __m256i ab_low = _mm256_unpacklo_epi32(acc.sum[0][v], acc.sum[1][v]);
  const __m256i ab_high = _mm256_unpackhi_epi32(acc.sum[0][v], acc.sum[1][v]);
  const __m256i cd_low = _mm256_unpacklo_epi32(acc.sum[2][v], acc.sum[3][v]);
  const __m256i cd_high = _mm256_unpackhi_epi32(acc.sum[2][v], acc.sum[3][v]);
  if constexpr (per_vector <= kLanes) {
    const __m256i ab = _mm256_add_epi32(ab_low, ab_high);
    const __m256i cd = _mm256_add_epi32(cd_low, cd_high);
    quads[0] = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return;
  }
  const __m256i columns[4] = {
      _mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
      _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
  if constexpr (per_vector == 4) {
    quads[0] = _mm256_add_epi32(columns[0], columns[1]);
    quads[1] = _mm256_add_epi32(columns[2], columns[3]);
  } else if constexpr (per_vector == 8) {
    for (int i = 0; i < 4; ++i) quads[i] = columns[i];
  }
}

// Writes the outputs of up to kOutputGroups row groups, acc[groups], and the tokens of a tile.
template <int per_vector, int vectors>
__attribute__((noinline)) void Finish(const ProductArgs& args, const Tile& tile, int64_t group,
                                      int groups, const RowSums<vectors>* acc) {
  const int64_t column = group * 4 - args.row_begin;
  const int begin = static_cast<int>(column < 0 ? -column : 0);
  const int end = static_cast<int>(MinInt(4 * groups, args.row_end - group * 4));
  const bool whole = begin == 0 && end == 4 * kOutputGroups;
  const __m256i row = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i rows = _mm256_and_si256(_mm256_cmpgt_epi32(row, _mm256_set1_epi32(begin - 1)),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32(end), row));
  const auto store = [&](int in_tile, __m256i sums) {
    if (in_tile >= tile.count) return;
    const int64_t token = tile.first + in_tile;
    float* const out = args.out + token * args.ld + column;
    const __m256 value =
        _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(args.sums[token])));
    const __m256 factor = _mm256_set1_ps(args.factors[token]);
    if (whole) {
      _mm256_storeu_ps(out, args.accumulate ? _mm256_fmadd_ps(value, factor, _mm256_loadu_ps(out))
                                            : _mm256_mul_ps(value, factor));
    } else {
      _mm256_maskstore_ps(out, rows,
                          args.accumulate
                              ? _mm256_fmadd_ps(value, factor, _mm256_maskload_ps(out, rows))
                              : _mm256_mul_ps(value, factor));
    }
  };
  constexpr int kQuads = kVectorQuads<per_vector>;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    __m256i quads[kOutputGroups][kQuads];
    for (int g = 0; g < kOutputGroups; ++g) {
      QuadSums<per_vector, vectors>(acc[g < groups ? g : 0], v, quads[g]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      const __m256i low = _mm256_permute2x128_si256(quads[0][q], quads[1][q], 0x20);
      const __m256i high = _mm256_permute2x128_si256(quads[0][q], quads[1][q], 0x31);
      if constexpr (per_vector == 1) {
        store(v, _mm256_add_epi32(low, high));
      } else {
        store(v * per_vector + q, low);
        store(v * per_vector + kQuads + q, high);
      }
    }
  }
}

}  // namespace
}  // namespace mmfree::cpu::avx2

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_TILES_H_
