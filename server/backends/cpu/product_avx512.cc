// Ternary products on AVX-512 VNNI.
//
// Four rows lie in a byte, b = c0 + 4 c1 + 16 c2 + 64 c3, and are not shifted out of it: the
// products of b & 0x03, b & 0x0f, b & 0x3f and b itself are sums of the first one, two, three and
// four terms, so their differences are 1, 4, 16 and 64 times the rows' sums, and three masks serve
// four rows. vpdpbusd wraps, so only the differences have to fit into an int32: 64 * 2 * 128 = 2^14
// in magnitude for each column, that is up to 2^17 columns (cpu_backend.cc).
#include "server/backends/cpu/product_avx512.h"

#include <immintrin.h>

#include "server/backends/cpu/product_avx512_tiles.h"

namespace mmfree::cpu::avx512 {
namespace {

struct NestedRows {
  static constexpr int kSums = 4;
  static constexpr int64_t kMaxColumns = int64_t{1} << 17;

  void Operands(__m512i b, __m512i* bytes) const {
    bytes[0] = _mm512_and_si512(b, mask0);
    bytes[1] = _mm512_and_si512(b, mask1);
    bytes[2] = _mm512_and_si512(b, mask2);
    bytes[3] = b;
  }

  static void Separate(const __m512i* sums, __m512i* rows) {
    rows[0] = sums[0];
    rows[1] = _mm512_srai_epi32(_mm512_sub_epi32(sums[1], sums[0]), 2);
    rows[2] = _mm512_srai_epi32(_mm512_sub_epi32(sums[2], sums[1]), 4);
    rows[3] = _mm512_srai_epi32(_mm512_sub_epi32(sums[3], sums[2]), 6);
  }

  const __m512i mask0 = _mm512_set1_epi8(0x03);
  const __m512i mask1 = _mm512_set1_epi8(0x0f);
  const __m512i mask2 = _mm512_set1_epi8(0x3f);
};

// One token and one row group. The sums of even and odd steps stay apart, which hides the latency
// of vpdpbusd.
__attribute__((noinline)) void AccumulateOneToken(const uint8_t* codes, const int8_t* panel,
                                                  int64_t steps, RowSums<1, 1>* acc) {
  const NestedRows rows;
  __m512i sum[2][4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = _mm512_setzero_si512();
  const auto add = [&](const uint8_t* b, const int8_t* x, __m512i* to) {
    FetchAhead(b, kAhead);
    __m512i bytes[4];
    rows.Operands(_mm512_loadu_si512(b), bytes);
    const __m512i activations = _mm512_loadu_si512(x);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) to[r] = _mm512_dpbusd_epi32(to[r], bytes[r], activations);
  };
  for (const uint8_t* const end = codes + steps / 2 * 2 * kVectorBytes; codes != end;
       codes += 2 * kVectorBytes) {
    add(codes, panel, sum[0]);
    add(codes + kVectorBytes, panel + kVectorBytes, sum[1]);
    panel += 2 * kVectorBytes;
  }
  if (steps % 2 != 0) add(codes, panel, sum[0]);
  __m512i folded[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i both = _mm512_add_epi32(sum[0][r], sum[1][r]);
    Fold<1, 1>(&both, folded + r);
  }
  __m512i separate[4];
  NestedRows::Separate(folded, separate);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc->sum[r][0] = separate[r];
}

void OneToken(const ProductArgs& args, const Tile& tile) {
  const int64_t last = (args.row_end + 3) / 4;
  for (int64_t group = args.row_begin / 4; group < last; group += kOutputGroups) {
    const int groups = static_cast<int>(MinInt(kOutputGroups, last - group));
    RowSums<1, 1> acc[kOutputGroups];
    for (int g = 0; g < groups; ++g) {
      AccumulateOneToken(args.codes + (group + g) * args.padded_cols, args.panel + tile.offset,
                         args.padded_cols / kVectorBytes, acc + g);
    }
    Finish<1, 1>(args, tile, group, groups, acc);
  }
}

}  // namespace

void Product(const ProductArgs& args) {
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.shape.per_vector * tile.shape.vectors == 1) {
      OneToken(args, tile);
    } else {
      TileProduct<NestedRows>(args, tile);
    }
  }
}

}  // namespace mmfree::cpu::avx512
