// Ternary products on AVX-512 VNNI with GFNI: three multiplications for four rows.
//
// Four rows lie in a byte, b = c0 + 4 c1 + 16 c2 + 64 c3. It is taken apart into three bytes that
// share a row each with the next, and of whose products vpdpbusd makes
//
//   T1 = S0 + 64 S3,   T2 = S3 + 64 S2,   T3 = S2 + 64 S1
//
// with S_i the sum of row i. Then T1 - 64 T2 + 64^2 T3 = S0 + 2^18 S1, whose low 18 bits are S0 as
// long as that fits into them as a signed number, and each of the other rows follows from the one
// before by a subtraction and a shift. A column adds at most 2 * 128 to a sum, so S0 fits over 2^17
// / 2^8 = 512 columns.
//
// Moving the two bits of a code within its byte takes one vgf2p8affineqb, where shifts and masks
// would take as long as the multiplication that is saved.
#include "server/backends/cpu/product_gfni.h"

#include <immintrin.h>

#include "server/backends/cpu/gfni_rows.h"
#include "server/backends/cpu/product_avx512.h"
#include "server/backends/cpu/product_avx512_tiles.h"

namespace mmfree::cpu::gfni {
namespace {

struct ChainedRows {
  static constexpr int kSums = 3;
  static constexpr int64_t kMaxColumns = kChainedColumns;

  void Operands(__m512i b, __m512i* bytes) const {
    bytes[0] = _mm512_and_si512(b, rows03);
    bytes[1] = _mm512_gf2p8affine_epi64_epi8(b, rows32, 0);
    bytes[2] = _mm512_gf2p8affine_epi64_epi8(b, rows21, 0);
  }

  static void Separate(const __m512i* sums, __m512i* rows) {
    const __m512i ends = _mm512_add_epi32(_mm512_sub_epi32(sums[0], _mm512_slli_epi32(sums[1], 6)),
                                          _mm512_slli_epi32(sums[2], 12));
    rows[0] = _mm512_srai_epi32(_mm512_slli_epi32(ends, 14), 14);
    rows[3] = _mm512_srai_epi32(_mm512_sub_epi32(sums[0], rows[0]), 6);
    rows[2] = _mm512_srai_epi32(_mm512_sub_epi32(sums[1], rows[3]), 6);
    rows[1] = _mm512_srai_epi32(_mm512_sub_epi32(sums[2], rows[2]), 6);
  }

  const __m512i rows03 = _mm512_set1_epi8(static_cast<char>(kRows03));
  const __m512i rows32 = _mm512_set1_epi64(kRows32);
  const __m512i rows21 = _mm512_set1_epi64(kRows21);
};

}  // namespace

void Product(const ProductArgs& args) {
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.shape.per_vector * tile.shape.vectors == 1) {
      ProductArgs one = args;
      one.tiles = &tile;
      one.num_tiles = 1;
      avx512::Product(one);
    } else {
      avx512::TileProduct<ChainedRows>(args, tile);
    }
  }
}

}  // namespace mmfree::cpu::gfni
