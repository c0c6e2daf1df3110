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
#include "server/backends/cpu/product_avx2_tiles.h"

namespace mmfree::cpu::avx2 {
namespace {

// Adds `steps` steps, at most 16, straight from the packed codes; rows 1 and 3 at bits 2-3, that is
// four times their sums.
template <int per_vector, int vectors>
__attribute__((noinline)) void AccumulatePacked(const uint8_t* codes, const int8_t* panel,
                                                int64_t steps, RowSums<vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  const __m256i low = _mm256_set1_epi8(0x03);
  const __m256i high = _mm256_set1_epi8(0x0c);
  __m256i sum[4 * vectors];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * vectors; ++i) sum[i] = _mm256_setzero_si256();
  for (const uint8_t* const end = codes + steps * kChunk; codes != end; codes += kChunk) {
    FetchAhead(codes, kAhead);
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
    __m256i& total = acc->sum[i / vectors][i % vectors];
    total = _mm256_add_epi32(total, _mm256_madd_epi16(sum[i], ones));
  }
}

template <int vectors>
void Clear(RowSums<vectors>* acc) {
  for (auto& row : acc->sum) {
    for (__m256i& sum : row) sum = _mm256_setzero_si256();
  }
}

// One row group and one tile of few tokens.
template <int per_vector, int vectors>
void PackedTile(const ProductArgs& args, const Tile& tile, int64_t group, RowSums<vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kAccumulations = 16;
  Clear(acc);
  const uint8_t* codes = args.codes + group * args.padded_cols;
  const int8_t* panel = args.panel + tile.offset;
  const int64_t steps = args.padded_cols / kChunk;
  for (int64_t step = 0; step < steps; step += kAccumulations) {
    AccumulatePacked<per_vector, vectors>(codes + step * kChunk,
                                          panel + step * vectors * kVectorBytes,
                                          MinInt(kAccumulations, steps - step), acc);
  }
  for (int v = 0; v < vectors; ++v) {
    acc->sum[1][v] = _mm256_srai_epi32(acc->sum[1][v], 2);
    acc->sum[3][v] = _mm256_srai_epi32(acc->sum[3][v], 2);
  }
}

template <int per_vector, int vectors>
void PackedRows(const ProductArgs& args, const Tile& tile) {
  const int64_t last = (args.row_end + 3) / 4;
  for (int64_t group = args.row_begin / 4; group < last; group += kOutputGroups) {
    const int groups = static_cast<int>(MinInt(kOutputGroups, last - group));
    RowSums<vectors> acc[kOutputGroups];
    for (int g = 0; g < groups; ++g) {
      PackedTile<per_vector, vectors>(args, tile, group + g, acc + g);
    }
    Finish<per_vector, vectors>(args, tile, group, groups, acc);
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
                                                   int64_t steps, RowSums<kVectors>* acc) {
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
      __m256i& total = acc->sum[i / kVectors][i % kVectors];
      total = _mm256_add_epi32(total, _mm256_madd_epi16(sum[i], ones));
    }
  }

  static void Block(const ProductArgs& args, const Tile* tiles, int num_tiles, int64_t group,
                    int groups) {
    alignas(64) uint8_t unpacked[kGroups][4 * kCols];
    RowSums<kVectors> acc[kTiles][kGroups];
    for (int i = 0; i < num_tiles; ++i) {
      for (int g = 0; g < groups; ++g) Clear(&acc[i][g]);
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
      for (int g = 0; g < groups; g += kOutputGroups) {
        const int count = static_cast<int>(MinInt(kOutputGroups, groups - g));
        Finish<per_vector, kVectors>(args, tiles[i], group + g, count, &acc[i][g]);
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
