// Ternary products on AVX2.
//
// vpmaddubsw multiplies 32 unsigned weight codes with 32 signed activations and adds neighbouring
// products into 16 int16 sums, which are accumulated as int16 and widened before they can overflow:
// activations are in [-128, 127], so a sum of n accumulated pairs of codes up to c lies in
//   [-256 c n, 254 c n],   within int16 for c n <= 128:
// n = 16 for codes masked in place at bits 2-3 (c = 8), n = 64 for codes at bits 0-1 (c = 2).
#include "server/backends/cpu/product_avx2.h"

#include <immintrin.h>

#include "server/backends/cpu/avx2_math.h"

namespace mmfree::cpu::avx2 {
namespace {

constexpr int kVectorBytes = 32;

// Fetches the codes that follow those at `codes`: the far ones from memory into L2, the near ones
// into L1.
void FetchAhead(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes + 8192), _MM_HINT_T1);
}

__m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

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

// Adds the partial sums of four rows (a, b, c, d) over the per_vector tokens of a vector and stores
// them as sums[token][row].
template <int per_vector>
void StoreSums(__m256i a, __m256i b, __m256i c, __m256i d, int32_t* sums) {
  __m128i* out = reinterpret_cast<__m128i*>(sums);
  if constexpr (per_vector == 8) {
    // Every element is a token of its own: a transpose of each 128-bit half.
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b);
    const __m256i ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d);
    const __m256i cd_high = _mm256_unpackhi_epi32(c, d);
    const __m256i tokens[4] = {
        _mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
    for (int t = 0; t < 4; ++t) {
      _mm_store_si128(out + t, _mm256_castsi256_si128(tokens[t]));
      _mm_store_si128(out + 4 + t, _mm256_extracti128_si256(tokens[t], 1));
    }
    return;
  }
  // hadd: (a0+a1, a2+a3, b0+b1, b2+b3) in each half.
  const __m256i ab = _mm256_hadd_epi32(a, b);
  const __m256i cd = _mm256_hadd_epi32(c, d);
  if constexpr (per_vector == 4) {
    const __m256 x = _mm256_castsi256_ps(ab);
    const __m256 y = _mm256_castsi256_ps(cd);
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88));
    const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd));
    _mm_store_si128(out, _mm256_castsi256_si128(even));
    _mm_store_si128(out + 1, _mm256_castsi256_si128(odd));
    _mm_store_si128(out + 2, _mm256_extracti128_si256(even, 1));
    _mm_store_si128(out + 3, _mm256_extracti128_si256(odd, 1));
    return;
  }
  const __m256i rows = _mm256_hadd_epi32(ab, cd);
  const __m128i low = _mm256_castsi256_si128(rows);
  const __m128i high = _mm256_extracti128_si256(rows, 1);
  if constexpr (per_vector == 2) {
    _mm_store_si128(out, low);
    _mm_store_si128(out + 1, high);
  } else {
    _mm_store_si128(out, _mm_add_epi32(low, high));
  }
}

// Turns the sums of a row group (sums[token][row], codes w + 1) into outputs.
void Finish(const ProductArgs& args, const Tile& tile, int64_t group, const int32_t* sums) {
  const int64_t column = group * 4 - args.row_begin;
  const int64_t begin = column < 0 ? -column : 0;
  const int64_t end = MinInt(4, args.row_end - group * 4);
  for (int32_t t = 0; t < tile.count; ++t) {
    const int32_t token = tile.first + t;
    float* out = args.out + token * args.ld + column;
    const __m128i sum = _mm_sub_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(sums) + t),
                                      _mm_set1_epi32(args.sums[token]));
    const __m128 value = _mm_cvtepi32_ps(sum);
    const __m128 factor = _mm_set1_ps(args.factors[token]);
    if (begin == 0 && end == 4) {
      _mm_storeu_ps(out, args.accumulate ? _mm_fmadd_ps(value, factor, _mm_loadu_ps(out))
                                         : _mm_mul_ps(value, factor));
      continue;
    }
    alignas(16) float old[4] = {};
    for (int64_t r = begin; r < end; ++r) old[r] = args.accumulate ? out[r] : 0.0f;
    alignas(16) float result[4];
    _mm_store_ps(result, args.accumulate ? _mm_fmadd_ps(value, factor, _mm_load_ps(old))
                                         : _mm_mul_ps(value, factor));
    for (int64_t r = begin; r < end; ++r) out[r] = result[r];
  }
}

// Widened sums of a row group with the tokens of a tile, sum[row * vectors + vector].
template <int vectors>
struct Accumulators {
  __m256i sum[4 * vectors];
};

// Adds `steps` steps, at most 16, straight from the packed codes; rows 1 and 3 at bits 2-3, that is
// four times their sums.
template <int per_vector, int vectors>
__attribute__((noinline)) void AccumulatePacked(const uint8_t* codes, const int8_t* panel,
                                                int64_t steps, Accumulators<vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  const __m256i low = _mm256_set1_epi8(0x03);
  const __m256i high = _mm256_set1_epi8(0x0c);
  __m256i sum[4 * vectors];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * vectors; ++i) sum[i] = _mm256_setzero_si256();
  for (const uint8_t* const end = codes + steps * kChunk; codes != end; codes += kChunk) {
    FetchAhead(codes);
    const __m256i packed = Broadcast<kChunk>(codes);
    const __m256i shifted = _mm256_srli_epi16(packed, 4);
    const __m256i w0 = _mm256_and_si256(packed, low);
    const __m256i w1 = _mm256_and_si256(packed, high);
    const __m256i w2 = _mm256_and_si256(shifted, low);
    const __m256i w3 = _mm256_and_si256(shifted, high);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const __m256i x = Load(panel + v * kVectorBytes);
      sum[v] = _mm256_add_epi16(sum[v], _mm256_maddubs_epi16(w0, x));
      sum[vectors + v] = _mm256_add_epi16(sum[vectors + v], _mm256_maddubs_epi16(w1, x));
      sum[2 * vectors + v] = _mm256_add_epi16(sum[2 * vectors + v], _mm256_maddubs_epi16(w2, x));
      sum[3 * vectors + v] = _mm256_add_epi16(sum[3 * vectors + v], _mm256_maddubs_epi16(w3, x));
    }
    panel += vectors * kVectorBytes;
  }
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int i = 0; i < 4 * vectors; ++i) {
    acc->sum[i] = _mm256_add_epi32(acc->sum[i], _mm256_madd_epi16(sum[i], ones));
  }
}

// One row group and one tile of few tokens.
template <int per_vector, int vectors>
void PackedTile(const ProductArgs& args, const Tile& tile, int64_t group) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kAccumulations = 16;
  Accumulators<vectors> acc;
  for (__m256i& sum : acc.sum) sum = _mm256_setzero_si256();
  const uint8_t* codes = args.codes + group * args.padded_cols;
  const int8_t* panel = args.panel + tile.offset;
  const int64_t steps = args.padded_cols / kChunk;
  for (int64_t step = 0; step < steps; step += kAccumulations) {
    AccumulatePacked<per_vector, vectors>(codes + step * kChunk,
                                          panel + step * vectors * kVectorBytes,
                                          MinInt(kAccumulations, steps - step), &acc);
  }
  alignas(32) int32_t sums[per_vector * vectors * 4];
  for (int v = 0; v < vectors; ++v) {
    StoreSums<per_vector>(acc.sum[v], _mm256_srai_epi32(acc.sum[vectors + v], 2),
                          acc.sum[2 * vectors + v], _mm256_srai_epi32(acc.sum[3 * vectors + v], 2),
                          sums + v * per_vector * 4);
  }
  Finish(args, tile, group, sums);
}

template <int per_vector, int vectors>
void PackedRows(const ProductArgs& args, const Tile& tile) {
  for (int64_t group = args.row_begin / 4; group * 4 < args.row_end; ++group) {
    PackedTile<per_vector, vectors>(args, tile, group);
  }
}

// Tiles of many tokens: the codes of a few row groups and one block of columns are unpacked into
// L1 and used for every tile.
template <int per_vector>
class UnpackedRows {
 public:
  // All of args.tiles[first .. first + count) have the shape {per_vector, 2}.
  static void Run(const ProductArgs& args, int32_t first, int32_t count) {
    for (int64_t group = args.row_begin / 4; group * 4 < args.row_end; group += kGroups) {
      const int64_t groups = MinInt(kGroups, (args.row_end + 3) / 4 - group);
      for (int32_t tile = 0; tile < count; tile += kTiles) {
        Block(args, args.tiles + first + tile, static_cast<int>(MinInt(kTiles, count - tile)),
              group, static_cast<int>(groups));
      }
    }
  }

 private:
  static constexpr int kVectors = 2;
  static constexpr int kChunk = kVectorBytes / per_vector;
  static constexpr int kSteps = 64;  // accumulations of codes at bits 0-1 that int16 holds
  static constexpr int kCols = kSteps * kChunk;
  static constexpr int kGroups = 8;
  static constexpr int kTiles = 16;

  static void Unpack(const uint8_t* packed, int64_t padded_cols, int64_t cols, uint8_t* unpacked) {
    const __m256i mask = _mm256_set1_epi8(0x03);
    for (int64_t k = 0; k < cols; k += kVectorBytes) {
      // The same columns of the next block of row groups.
      _mm_prefetch(reinterpret_cast<const char*>(packed + k + kGroups * padded_cols), _MM_HINT_T1);
      const __m256i bytes = Load(packed + k);
      __m256i* out = reinterpret_cast<__m256i*>(unpacked + k);
      _mm256_store_si256(out, _mm256_and_si256(bytes, mask));
      _mm256_store_si256(out + kCols / 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask));
      _mm256_store_si256(out + 2 * kCols / 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
      _mm256_store_si256(out + 3 * kCols / 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 6), mask));
    }
  }

  // Adds `steps` steps, at most kSteps, of unpacked codes; as AccumulatePacked.
  __attribute__((noinline)) static void Accumulate(const uint8_t* unpacked, const int8_t* panel,
                                                   int64_t steps, Accumulators<kVectors>* acc) {
    __m256i sum[4 * kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kVectors; ++i) sum[i] = _mm256_setzero_si256();
    for (const uint8_t* const end = unpacked + steps * kChunk; unpacked != end;
         unpacked += kChunk) {
      const __m256i x0 = Load(panel);
      const __m256i x1 = Load(panel + kVectorBytes);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m256i w = Broadcast<kChunk>(unpacked + r * kCols);
        __m256i* const row = sum + r * kVectors;
        row[0] = _mm256_add_epi16(row[0], _mm256_maddubs_epi16(w, x0));
        row[1] = _mm256_add_epi16(row[1], _mm256_maddubs_epi16(w, x1));
      }
      panel += kVectors * kVectorBytes;
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kVectors; ++i) {
      acc->sum[i] = _mm256_add_epi32(acc->sum[i], _mm256_madd_epi16(sum[i], ones));
    }
  }

  static void Block(const ProductArgs& args, const Tile* tiles, int num_tiles, int64_t group,
                    int groups) {
    alignas(64) uint8_t unpacked[kGroups][4 * kCols];
    Accumulators<kVectors> acc[kTiles][kGroups];
    for (int i = 0; i < num_tiles; ++i) {
      for (int g = 0; g < groups; ++g) {
        for (__m256i& sum : acc[i][g].sum) sum = _mm256_setzero_si256();
      }
    }
    for (int64_t k = 0; k < args.padded_cols; k += kCols) {
      const int64_t cols = MinInt(kCols, args.padded_cols - k);
      for (int g = 0; g < groups; ++g) {
        Unpack(args.codes + (group + g) * args.padded_cols + k, args.padded_cols, cols,
               unpacked[g]);
      }
      for (int i = 0; i < num_tiles; ++i) {
        const int8_t* panel = args.panel + tiles[i].offset + k * per_vector * kVectors;
        for (int g = 0; g < groups; ++g) Accumulate(unpacked[g], panel, cols / kChunk, &acc[i][g]);
      }
    }
    for (int i = 0; i < num_tiles; ++i) {
      for (int g = 0; g < groups; ++g) {
        alignas(32) int32_t sums[per_vector * kVectors * 4];
        const __m256i* row = acc[i][g].sum;
        for (int v = 0; v < kVectors; ++v) {
          StoreSums<per_vector>(row[v], row[kVectors + v], row[2 * kVectors + v],
                                row[3 * kVectors + v], sums + v * per_vector * 4);
        }
        Finish(args, tiles[i], group + g, sums);
      }
    }
  }
};

}  // namespace

void Product(const ProductArgs& args) {
  for (int32_t i = 0; i < args.num_tiles;) {
    const Tile& tile = args.tiles[i];
    int32_t same = 1;
    switch (tile.shape.per_vector * tile.shape.vectors) {
      case 1:
        PackedRows<1, 1>(args, tile);
        break;
      case 2:
        PackedRows<1, 2>(args, tile);
        break;
      case 4:
        PackedRows<2, 2>(args, tile);
        break;
      case 8:
        UnpackedRows<4>::Run(args, i, 1);
        break;
      default:
        while (i + same < args.num_tiles && args.tiles[i + same].shape.per_vector == 8) ++same;
        UnpackedRows<8>::Run(args, i, same);
        break;
    }
    i += same;
  }
}

}  // namespace mmfree::cpu::avx2
