// Ternary products on AMX int8, for tiles of more than 16 tokens; fewer are product_gfni.cc's.
//
// tdpbusd multiplies a tile of 16 rows x 64 unsigned bytes with one of 64 signed bytes x 16 tokens.
// The second is what a panel holds for 64 columns of a vector of 16 tokens. The first is unpacked
// from the stored codes: the four rows of a byte as nested sums (product_avx512.cc), which takes
// three masks and four stores for 64 bytes.
#include "server/backends/cpu/product_amx.h"

#include <immintrin.h>

#include "server/backends/cpu/product_gfni.h"

namespace mmfree::cpu::amx {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTile = kTileRows * kTileBytes;
constexpr int kSums = kTile / 4;
// Two row tiles by two vectors of tokens: four tiles of sums, each operand used twice.
constexpr int kRowTiles = 2;
constexpr int kVectors = 2;
constexpr int64_t kPanelRow = kVectors * kTileBytes;  // four columns of a tile of tokens
constexpr int kGroupsPerTile = kTileRows / 4;
constexpr int kGroups = kRowTiles * kGroupsPerTile;
// Steps of 64 columns that are unpacked at a time, 32 KiB, and the tiles of tokens that share them.
constexpr int kSteps = 16;
constexpr int kTokenTiles = 8;

int64_t MinInt(int64_t a, int64_t b) { return a < b ? a : b; }

// The operand of ldtilecfg: palette 1, every tile 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile intrinsics do not tell the compiler which memory they read.
void MemoryIsRead() { __asm__ volatile("" ::: "memory"); }

// Unpacks `groups` row groups of 64 * steps columns: tile (step, row tile) at
// unpacked + (step * kRowTiles + row tile) * kTile.
void Unpack(const uint8_t* codes, int64_t padded_cols, int groups, int steps, uint8_t* unpacked) {
  const __m512i mask0 = _mm512_set1_epi8(0x03);
  const __m512i mask1 = _mm512_set1_epi8(0x0f);
  const __m512i mask2 = _mm512_set1_epi8(0x3f);
  for (int g = 0; g < groups; ++g) {
    const uint8_t* from = codes + g * padded_cols;
    uint8_t* to = unpacked + g / kGroupsPerTile * kTile + g % kGroupsPerTile * 4 * kTileBytes;
    for (int s = 0; s < steps; ++s) {
      // The same columns of the next block of row groups.
      _mm_prefetch(reinterpret_cast<const char*>(from + kGroups * padded_cols), _MM_HINT_T1);
      const __m512i b = _mm512_loadu_si512(from);
      _mm512_store_si512(to, _mm512_and_si512(b, mask0));
      _mm512_store_si512(to + kTileBytes, _mm512_and_si512(b, mask1));
      _mm512_store_si512(to + 2 * kTileBytes, _mm512_and_si512(b, mask2));
      _mm512_store_si512(to + 3 * kTileBytes, b);
      from += kTileBytes;
      to += kRowTiles * kTile;
    }
  }
}

// sums[row tile][vector] += unpacked rows x panel, over `steps` steps of 64 columns; from zero if
// `first`.
void Multiply(const uint8_t* unpacked, const int8_t* panel, int steps, bool first, int32_t* sums) {
  MemoryIsRead();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kTileBytes);
    _tile_loadd(1, sums + kSums, kTileBytes);
    _tile_loadd(2, sums + 2 * kSums, kTileBytes);
    _tile_loadd(3, sums + 3 * kSums, kTileBytes);
  }
  for (int s = 0; s < steps; ++s) {
    _tile_loadd(4, unpacked, kTileBytes);
    _tile_loadd(6, panel, kPanelRow);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, panel + kTileBytes, kPanelRow);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, unpacked + kTile, kTileBytes);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    unpacked += kRowTiles * kTile;
    panel += kTileRows * kPanelRow;
  }
  _tile_stored(0, sums, kTileBytes);
  _tile_stored(1, sums + kSums, kTileBytes);
  _tile_stored(2, sums + 2 * kSums, kTileBytes);
  _tile_stored(3, sums + 3 * kSums, kTileBytes);
}

// Rows become columns.
void Transpose(__m512i (&m)[16]) {
  __m512i t[16];
  // Within each 128-bit lane: four by four.
  for (int i = 0; i < 16; i += 4) {
    const __m512i ab_low = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    const __m512i ab_high = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    const __m512i cd_low = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]);
    const __m512i cd_high = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
    t[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
    t[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    t[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    t[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }
  // Then the lanes: t[4 * i + j] holds in lane l rows 4i .. 4i+3 of column 4l + j.
  for (int j = 0; j < 4; ++j) {
    const __m512i low02 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    m[j] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    m[8 + j] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    m[4 + j] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    m[12 + j] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
}

// Outputs of 16 rows, the first of them `row`, and `count` tokens from `token` on.
void FinishTile(const ProductArgs& args, int64_t row, int32_t token, int32_t count,
                const int32_t* sums) {
  __m512i m[16];
  for (int r = 0; r < kTileRows; ++r) m[r] = _mm512_load_si512(sums + r * kTileRows);
  for (int r = 0; r < kTileRows; r += 4) {
    m[r + 3] = _mm512_srai_epi32(_mm512_sub_epi32(m[r + 3], m[r + 2]), 6);
    m[r + 2] = _mm512_srai_epi32(_mm512_sub_epi32(m[r + 2], m[r + 1]), 4);
    m[r + 1] = _mm512_srai_epi32(_mm512_sub_epi32(m[r + 1], m[r]), 2);
  }
  Transpose(m);
  const int64_t column = row - args.row_begin;
  const int64_t begin = column < 0 ? -column : 0;
  const int64_t end = MinInt(kTileRows, args.row_end - row);
  const __mmask16 rows = static_cast<__mmask16>((1u << end) - (1u << begin));
  for (int32_t t = 0; t < count; ++t) {
    float* out = args.out + (token + t) * args.ld + column;
    const __m512i sum = _mm512_sub_epi32(m[t], _mm512_set1_epi32(args.sums[token + t]));
    const __m512 value = _mm512_cvtepi32_ps(sum);
    const __m512 factor = _mm512_set1_ps(args.factors[token + t]);
    const __m512 result = args.accumulate
                              ? _mm512_fmadd_ps(value, factor, _mm512_maskz_loadu_ps(rows, out))
                              : _mm512_mul_ps(value, factor);
    _mm512_mask_storeu_ps(out, rows, result);
  }
}

// Row groups [group, group + groups) with up to kTokenTiles tiles.
void Block(const ProductArgs& args, const Tile* tiles, int num_tiles, int64_t group, int groups) {
  alignas(64) uint8_t unpacked[kSteps * kRowTiles * kTile];
  alignas(64) int32_t sums[kTokenTiles][kRowTiles * kVectors][kSums];
  // Rows that a smaller block leaves unused are multiplied, too.
  if (groups < kGroups) __builtin_memset(unpacked, 0, sizeof(unpacked));
  const int64_t steps = args.padded_cols / kTileBytes;
  for (int64_t step = 0; step < steps; step += kSteps) {
    const int count = static_cast<int>(MinInt(kSteps, steps - step));
    Unpack(args.codes + group * args.padded_cols + step * kTileBytes, args.padded_cols, groups,
           count, unpacked);
    for (int i = 0; i < num_tiles; ++i) {
      const int8_t* panel = args.panel + tiles[i].offset + step * kTileRows * kPanelRow;
      Multiply(unpacked, panel, count, step == 0, sums[i][0]);
    }
  }
  for (int i = 0; i < num_tiles; ++i) {
    for (int r = 0; r * kGroupsPerTile < groups; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t count = MinInt(kTileRows, tiles[i].count - v * kTileRows);
        FinishTile(args, group * 4 + r * kTileRows, tiles[i].first + v * kTileRows,
                   static_cast<int32_t>(count), sums[i][r * kVectors + v]);
      }
    }
  }
}

void ManyTokens(const ProductArgs& args, const Tile* tiles, int num_tiles) {
  const int64_t last = (args.row_end + 3) / 4;
  for (int64_t group = args.row_begin / 4; group < last; group += kGroups) {
    const int groups = static_cast<int>(MinInt(kGroups, last - group));
    for (int i = 0; i < num_tiles; i += kTokenTiles) {
      Block(args, tiles + i, static_cast<int>(MinInt(kTokenTiles, num_tiles - i)), group, groups);
    }
  }
}

}  // namespace

void Product(const ProductArgs& args) {
  // All tiles but the last are full; the last one may be product_gfni.cc's.
  int num_tiles = args.num_tiles;
  if (num_tiles > 0 && args.tiles[num_tiles - 1].shape.per_vector != kTileRows) --num_tiles;
  if (num_tiles > 0) {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
    ManyTokens(args, args.tiles, num_tiles);
    _tile_release();
  }
  ProductArgs rest = args;
  rest.tiles += num_tiles;
  rest.num_tiles -= num_tiles;
  gfni::Product(rest);
}

}  // namespace mmfree::cpu::amx
