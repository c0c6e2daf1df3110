// Ternary products on AVX-512 VNNI.
//
// vpdpbusd multiplies 64 unsigned bytes with 64 signed activations and adds groups of four products
// into 16 int32 sums. Four rows lie in a byte, b = c0 + 4 c1 + 16 c2 + 64 c3, and are not shifted
// out of it: the products of b & 0x03, b & 0x0f, b & 0x3f and b itself are sums of the first one,
// two, three and four terms, so their differences are 1, 4, 16 and 64 times the rows' sums, and
// three masks serve four rows. vpdpbusd wraps, so only the differences have to fit into an int32:
// 64 * 2 * 128 = 2^14 in magnitude for each column, that is up to 2^17 columns (cpu_backend.cc).
#include "server/backends/cpu/product_avx512.h"

#include <immintrin.h>

namespace mmfree::cpu::avx512 {
namespace {

constexpr int kVectorBytes = 64;

int64_t MinInt(int64_t a, int64_t b) { return a < b ? a : b; }

// Fetches the codes that follow those at `codes`: the far ones from memory into L2, the near ones
// into L1. The products of one token read memory at 118 % of plain loops' bandwidth with it and at
// 83 % with the near ones alone (2.7B, two threads of a Xeon).
void FetchAhead(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes + 8192), _MM_HINT_T1);
}

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

__m512 AsFloat(__m512i v) { return _mm512_castsi512_ps(v); }
__m512i AsInt(__m512 v) { return _mm512_castps_si512(v); }

// The sums of a row group with the tokens of a tile, sum[row * vectors + vector].
template <int vectors>
struct Accumulators {
  __m512i sum[4 * vectors];
};

// For four vectors with four partial sums a token (one 128-bit lane), the four rows of that token.
__m512i SumLanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Adds neighbouring 128-bit lanes: (x0+x1, x2+x3, y0+y1, y2+y3).
__m512i SumLanePairs(__m512i x, __m512i y) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// Adds the partial sums of four rows over the tokens of a tile and stores them as
// sums[token][row].
template <int per_vector, int vectors>
void StoreSums(const Accumulators<vectors>& acc, int32_t* sums) {
  const auto row = [&acc](int r, int v) { return acc.sum[r * vectors + v]; };
  if constexpr (per_vector == 16) {
    // Every element is a token of its own: a transpose of each lane.
    for (int v = 0; v < vectors; ++v) {
      const __m512i ab_low = _mm512_unpacklo_epi32(row(0, v), row(1, v));
      const __m512i ab_high = _mm512_unpackhi_epi32(row(0, v), row(1, v));
      const __m512i cd_low = _mm512_unpacklo_epi32(row(2, v), row(3, v));
      const __m512i cd_high = _mm512_unpackhi_epi32(row(2, v), row(3, v));
      const __m512i tokens[4] = {
          _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
          _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
      __m128i* out = reinterpret_cast<__m128i*>(sums) + v * 16;
      for (int t = 0; t < 4; ++t) {
        _mm_store_si128(out + t, _mm512_castsi512_si128(tokens[t]));
        _mm_store_si128(out + 4 + t, _mm512_extracti32x4_epi32(tokens[t], 1));
        _mm_store_si128(out + 8 + t, _mm512_extracti32x4_epi32(tokens[t], 2));
        _mm_store_si128(out + 12 + t, _mm512_extracti32x4_epi32(tokens[t], 3));
      }
    }
  } else if constexpr (per_vector == 8) {
    for (int v = 0; v < vectors; ++v) {
      // Each lane: two partial sums of an even token, two of an odd one.
      const auto pairs = [&](int r) {
        const __m512 a = AsFloat(row(r, v));
        const __m512 b = AsFloat(row(r + 1, v));
        return AsFloat(_mm512_add_epi32(AsInt(_mm512_shuffle_ps(a, b, 0x88)),
                                        AsInt(_mm512_shuffle_ps(a, b, 0xdd))));
      };
      const __m512 ab = pairs(0);
      const __m512 cd = pairs(2);
      const __m512i even = AsInt(_mm512_shuffle_ps(ab, cd, 0x88));
      const __m512i odd = AsInt(_mm512_shuffle_ps(ab, cd, 0xdd));
      __m128i* out = reinterpret_cast<__m128i*>(sums) + v * 8;
      _mm_store_si128(out, _mm512_castsi512_si128(even));
      _mm_store_si128(out + 1, _mm512_castsi512_si128(odd));
      _mm_store_si128(out + 2, _mm512_extracti32x4_epi32(even, 1));
      _mm_store_si128(out + 3, _mm512_extracti32x4_epi32(odd, 1));
      _mm_store_si128(out + 4, _mm512_extracti32x4_epi32(even, 2));
      _mm_store_si128(out + 5, _mm512_extracti32x4_epi32(odd, 2));
      _mm_store_si128(out + 6, _mm512_extracti32x4_epi32(even, 3));
      _mm_store_si128(out + 7, _mm512_extracti32x4_epi32(odd, 3));
    }
  } else {
    __m512i lanes[4];
    for (int v = 0; v < 4; ++v) {
      lanes[v] = v < vectors ? SumLanes(row(0, v), row(1, v), row(2, v), row(3, v))
                             : _mm512_setzero_si512();
    }
    if constexpr (per_vector == 4) {
      for (int v = 0; v < vectors; ++v) _mm512_store_si512(sums + 16 * v, lanes[v]);
    } else {
      const __m512i low = SumLanePairs(lanes[0], lanes[1]);
      const __m512i high = SumLanePairs(lanes[2], lanes[3]);
      if constexpr (per_vector == 2) {
        _mm512_store_si512(sums, low);
        if constexpr (vectors > 2) _mm512_store_si512(sums + 16, high);
      } else {
        _mm512_store_si512(sums, SumLanePairs(low, high));
      }
    }
  }
}

// Turns the sums of a row group (sums[token][row], codes w + 1) into outputs.
void Finish(const ProductArgs& args, const Tile& tile, int64_t group, const int32_t* sums) {
  const int64_t column = group * 4 - args.row_begin;
  const int64_t begin = column < 0 ? -column : 0;
  const int64_t end = MinInt(4, args.row_end - group * 4);
  const __mmask8 rows = static_cast<__mmask8>((1 << end) - (1 << begin));
  for (int32_t t = 0; t < tile.count; ++t) {
    const int32_t token = tile.first + t;
    float* out = args.out + token * args.ld + column;
    const __m128i sum = _mm_sub_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(sums) + t),
                                      _mm_set1_epi32(args.sums[token]));
    const __m128 value = _mm_cvtepi32_ps(sum);
    const __m128 factor = _mm_set1_ps(args.factors[token]);
    const __m128 result = args.accumulate
                              ? _mm_fmadd_ps(value, factor, _mm_maskz_loadu_ps(rows, out))
                              : _mm_mul_ps(value, factor);
    _mm_mask_storeu_ps(out, rows, result);
  }
}

// The rows' own sums from the nested ones (see the top), in place.
template <int vectors>
void SeparateRows(Accumulators<vectors>& acc) {
  for (int v = 0; v < vectors; ++v) {
    __m512i* const sum = acc.sum + v;
    sum[3 * vectors] = _mm512_srai_epi32(_mm512_sub_epi32(sum[3 * vectors], sum[2 * vectors]), 6);
    sum[2 * vectors] = _mm512_srai_epi32(_mm512_sub_epi32(sum[2 * vectors], sum[vectors]), 4);
    sum[vectors] = _mm512_srai_epi32(_mm512_sub_epi32(sum[vectors], sum[0]), 2);
  }
}

// Adds `steps` steps of a row group and a tile to *acc. A function of its own, so that its
// registers are its own.
template <int per_vector, int vectors>
__attribute__((noinline)) void Accumulate(const uint8_t* codes, const int8_t* panel, int64_t steps,
                                          Accumulators<vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  const __m512i mask0 = _mm512_set1_epi8(0x03);
  const __m512i mask1 = _mm512_set1_epi8(0x0f);
  const __m512i mask2 = _mm512_set1_epi8(0x3f);
  __m512i sum[4 * vectors];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * vectors; ++i) sum[i] = acc->sum[i];
  for (const uint8_t* const end = codes + steps * kChunk; codes != end; codes += kChunk) {
    FetchAhead(codes);
    const __m512i b = Broadcast<kChunk>(codes);
    const __m512i b0 = _mm512_and_si512(b, mask0);
    const __m512i b1 = _mm512_and_si512(b, mask1);
    const __m512i b2 = _mm512_and_si512(b, mask2);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const __m512i x = _mm512_loadu_si512(panel + v * kVectorBytes);
      sum[v] = _mm512_dpbusd_epi32(sum[v], b0, x);
      sum[vectors + v] = _mm512_dpbusd_epi32(sum[vectors + v], b1, x);
      sum[2 * vectors + v] = _mm512_dpbusd_epi32(sum[2 * vectors + v], b2, x);
      sum[3 * vectors + v] = _mm512_dpbusd_epi32(sum[3 * vectors + v], b, x);
    }
    panel += vectors * kVectorBytes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * vectors; ++i) acc->sum[i] = sum[i];
}

// One token and one row group: the sums of even and odd steps apart, sum[row * 2 + step % 2], which
// hides the latency of vpdpbusd. `steps` is even.
__attribute__((noinline)) void AccumulateOneToken(const uint8_t* codes, const int8_t* panel,
                                                  int64_t steps, Accumulators<2>* acc) {
  const __m512i mask0 = _mm512_set1_epi8(0x03);
  const __m512i mask1 = _mm512_set1_epi8(0x0f);
  const __m512i mask2 = _mm512_set1_epi8(0x3f);
  __m512i sum[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sum[i] = acc->sum[i];
  for (const uint8_t* const end = codes + steps * kVectorBytes; codes != end;
       codes += 2 * kVectorBytes) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const int at = odd * kVectorBytes;
      FetchAhead(codes + at);
      const __m512i b = _mm512_loadu_si512(codes + at);
      const __m512i x = _mm512_loadu_si512(panel + at);
      sum[odd] = _mm512_dpbusd_epi32(sum[odd], _mm512_and_si512(b, mask0), x);
      sum[2 + odd] = _mm512_dpbusd_epi32(sum[2 + odd], _mm512_and_si512(b, mask1), x);
      sum[4 + odd] = _mm512_dpbusd_epi32(sum[4 + odd], _mm512_and_si512(b, mask2), x);
      sum[6 + odd] = _mm512_dpbusd_epi32(sum[6 + odd], b, x);
    }
    panel += 2 * kVectorBytes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) acc->sum[i] = sum[i];
}

void OneToken(const ProductArgs& args, const Tile& tile) {
  const int64_t steps = args.padded_cols / kVectorBytes;
  const int64_t even_steps = steps / 2 * 2;
  const int8_t* panel = args.panel + tile.offset;
  for (int64_t group = args.row_begin / 4; group * 4 < args.row_end; ++group) {
    const uint8_t* codes = args.codes + group * args.padded_cols;
    Accumulators<2> halves;
    for (__m512i& sum : halves.sum) sum = _mm512_setzero_si512();
    AccumulateOneToken(codes, panel, even_steps, &halves);
    Accumulators<1> acc;
    for (int r = 0; r < 4; ++r) {
      acc.sum[r] = _mm512_add_epi32(halves.sum[2 * r], halves.sum[2 * r + 1]);
    }
    Accumulate<1, 1>(codes + even_steps * kVectorBytes, panel + even_steps * kVectorBytes,
                     steps - even_steps, &acc);
    SeparateRows(acc);
    alignas(64) int32_t sums[16];
    StoreSums<1, 1>(acc, sums);
    Finish(args, tile, group, sums);
  }
}

// A tile of several tokens. Blocks of columns keep the activations in L1 for a few row groups.
template <int per_vector, int vectors>
void ManyTokens(const ProductArgs& args, const Tile& tile) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kSteps = 64;  // 16 KiB of activations with four vectors
  constexpr int kGroups = 16;
  const int64_t steps = args.padded_cols / kChunk;
  const int64_t last = (args.row_end + 3) / 4;
  for (int64_t group = args.row_begin / 4; group < last; group += kGroups) {
    const int groups = static_cast<int>(MinInt(kGroups, last - group));
    Accumulators<vectors> acc[kGroups];
    for (int g = 0; g < groups; ++g) {
      for (__m512i& sum : acc[g].sum) sum = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int8_t* panel = args.panel + tile.offset + step * vectors * kVectorBytes;
      const int64_t count = MinInt(kSteps, steps - step);
      for (int g = 0; g < groups; ++g) {
        Accumulate<per_vector, vectors>(args.codes + (group + g) * args.padded_cols + step * kChunk,
                                        panel, count, acc + g);
      }
    }
    for (int g = 0; g < groups; ++g) {
      SeparateRows(acc[g]);
      alignas(64) int32_t sums[kMaxTileTokens * 4];
      StoreSums<per_vector, vectors>(acc[g], sums);
      Finish(args, tile, group + g, sums);
    }
  }
}

}  // namespace

void Product(const ProductArgs& args) {
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const Tile& tile = args.tiles[i];
    switch (tile.shape.per_vector * tile.shape.vectors) {
      case 1:
        OneToken(args, tile);
        break;
      case 2:
        ManyTokens<1, 2>(args, tile);
        break;
      case 4:
        ManyTokens<1, 4>(args, tile);
        break;
      case 6:
        ManyTokens<2, 3>(args, tile);
        break;
      case 8:
        ManyTokens<2, 4>(args, tile);
        break;
      case 12:
        ManyTokens<4, 3>(args, tile);
        break;
      case 16:
        ManyTokens<4, 4>(args, tile);
        break;
      case 24:
        ManyTokens<8, 3>(args, tile);
        break;
      case 32:
        ManyTokens<8, 4>(args, tile);
        break;
      case 48:
        ManyTokens<16, 3>(args, tile);
        break;
      default:
        ManyTokens<16, 4>(args, tile);
        break;
    }
  }
}

}  // namespace mmfree::cpu::avx512
