// Ternary products on AVX-VNNI with GFNI, in vectors of 32 bytes: the three multiplications for
// four rows of product_gfni.cc, for processors that have these two and no AVX-512.
#include "server/backends/cpu/product_avx_vnni.h"

#include <immintrin.h>

#include "server/backends/cpu/avx2_math.h"
#include "server/backends/cpu/gfni_rows.h"
#include "server/backends/cpu/product_avx2_tiles.h"

namespace mmfree::cpu::avx_vnni {
namespace {

using avx2::Broadcast;
using avx2::FetchAhead;
using avx2::Finish;
using avx2::kAhead;
using avx2::kOutputGroups;
using avx2::kVectorBytes;
using avx2::Load;
using avx2::MinInt;
using avx2::RowSums;

constexpr int kSums = 3;
// Steps, of four columns for each 32-bit sum, before the rows are separated: no more than 16 KiB of
// activations, and no more columns than S0 has room for.
constexpr int64_t kSteps = kChainedColumns / 4;

// What makes the three operands of a byte of codes: a mask and two matrices.
struct alignas(kVectorBytes) Operands {
  int64_t rows[kSums][4];
};
constexpr int64_t kMask03 = static_cast<int64_t>(0x0101010101010101u * uint64_t{kRows03});
constexpr Operands kOperands = {{{kMask03, kMask03, kMask03, kMask03},
                                 {kRows32, kRows32, kRows32, kRows32},
                                 {kRows21, kRows21, kRows21, kRows21}}};

// The steps up to `end` of four vectors of activations: sum[i * 4 + v] = sum of operands[i] x[v].
// Twelve sums, three operands and one x are all registers there are, and GCC 12 copies sums from
// step to step and keeps some in memory: so the whole loop by its instructions.
template <int chunk>
inline void StepsOfFour(const uint8_t* codes, const uint8_t* end, const int8_t* panel,
                        int64_t ahead, __m256i* sum) {
// clang-format off
// One x and the sums of the three operands with it.
#define MULTIPLY(x, sum0, sum1, sum2)                 \
  "vmovdqu " x "(%[panel]), %%ymm15\n\t"              \
  "%{vex%} vpdpbusd %%ymm15, %%ymm12, " sum0 "\n\t"   \
  "%{vex%} vpdpbusd %%ymm15, %%ymm13, " sum1 "\n\t"   \
  "%{vex%} vpdpbusd %%ymm15, %%ymm14, " sum2 "\n\t"
#define ZERO(sum) "vpxor " sum ", " sum ", " sum "\n\t"
#define STEPS(broadcast, bytes)                                                                \
  __asm__ volatile(                                                                            \
      ZERO("%0") ZERO("%1") ZERO("%2") ZERO("%3") ZERO("%4") ZERO("%5")                        \
      ZERO("%6") ZERO("%7") ZERO("%8") ZERO("%9") ZERO("%10") ZERO("%11")                      \
      ".p2align 5\n"                                                                           \
      "1:\n\t"                                                                                 \
      broadcast " (%[codes]), %%ymm14\n\t"                                                     \
      "prefetcht0 (%[codes], %[ahead])\n\t"                                                    \
      "prefetcht1 (%[codes], %[ahead], 4)\n\t"                                                 \
      "vpand (%[operands]), %%ymm14, %%ymm12\n\t"                                              \
      "vgf2p8affineqb $0, 32(%[operands]), %%ymm14, %%ymm13\n\t"                               \
      "vgf2p8affineqb $0, 64(%[operands]), %%ymm14, %%ymm14\n\t"                               \
      MULTIPLY("", "%0", "%4", "%8")                                                           \
      MULTIPLY("32", "%1", "%5", "%9")                                                         \
      MULTIPLY("64", "%2", "%6", "%10")                                                        \
      MULTIPLY("96", "%3", "%7", "%11")                                                        \
      "add $" bytes ", %[codes]\n\t"                                                           \
      "add $128, %[panel]\n\t"                                                                 \
      "cmp %[end], %[codes]\n\t"                                                               \
      "jne 1b"                                                                                 \
      : "=&x"(sum[0]), "=&x"(sum[1]), "=&x"(sum[2]), "=&x"(sum[3]), "=&x"(sum[4]),             \
        "=&x"(sum[5]), "=&x"(sum[6]), "=&x"(sum[7]), "=&x"(sum[8]), "=&x"(sum[9]),             \
        "=&x"(sum[10]), "=&x"(sum[11]), [codes] "+r"(codes), [panel] "+r"(panel)               \
      : [end] "r"(end), [ahead] "r"(ahead), [operands] "r"(&kOperands)                         \
      : "ymm12", "ymm13", "ymm14", "ymm15", "cc", "memory")
  // clang-format on
  if constexpr (chunk == 32) STEPS("vmovdqu", "32");
  if constexpr (chunk == 16) STEPS("vbroadcasti128", "16");
  if constexpr (chunk == 8) STEPS("vpbroadcastq", "8");
  if constexpr (chunk == 4) STEPS("vpbroadcastd", "4");
#undef STEPS
#undef ZERO
#undef MULTIPLY
}

// *sum += bytes x, and a point at which a sum stays where it was: as in product_avx512_tiles.h.
inline void MultiplyAdd(__m256i bytes, __m256i x, __m256i* sum) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*sum) : "x"(bytes), "x"(x));
}
inline void KeepInPlace(__m256i* sum) { __asm__("" : "+x"(*sum)); }

// The rows' own sums of codes w + 1, from those of the multiplications.
inline void Separate(__m256i t1, __m256i t2, __m256i t3, __m256i* rows) {
  const __m256i ends =
      _mm256_add_epi32(_mm256_sub_epi32(t1, _mm256_slli_epi32(t2, 6)), _mm256_slli_epi32(t3, 12));
  rows[0] = _mm256_srai_epi32(_mm256_slli_epi32(ends, 14), 14);
  rows[3] = _mm256_srai_epi32(_mm256_sub_epi32(t1, rows[0]), 6);
  rows[2] = _mm256_srai_epi32(_mm256_sub_epi32(t2, rows[3]), 6);
  rows[1] = _mm256_srai_epi32(_mm256_sub_epi32(t3, rows[2]), 6);
}

// The sums of `steps` steps, a positive even number, of a row group and a tile, added to *acc, or
// put there when they are the first. With few vectors the sums of even and odd steps stay apart,
// which hides the latency of vpdpbusd. A function of its own, so that its registers are its own.
template <int per_vector, int vectors>
__attribute__((noinline)) void Accumulate(const uint8_t* codes, const int8_t* panel, int64_t steps,
                                          int64_t ahead, bool first, RowSums<vectors>* acc) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kSets = vectors <= 2 ? 2 : 1;
  constexpr int kCount = kSums * vectors;
  __m256i sum[kSets * kCount];  // [kSets][kSums][vectors]
  const uint8_t* const end = codes + steps * kChunk;
  if constexpr (vectors == 4) {
    StepsOfFour<kChunk>(codes, end, panel, ahead, sum);
  } else {
    const __m256i rows03 = _mm256_set1_epi8(static_cast<char>(kRows03));
    const __m256i rows32 = _mm256_set1_epi64x(kRows32);
    const __m256i rows21 = _mm256_set1_epi64x(kRows21);
#pragma GCC unroll 12
    for (__m256i& zero : sum) zero = _mm256_setzero_si256();
    do {
      FetchAhead(codes, ahead);
#pragma GCC unroll 2
      for (int step = 0; step < 2; ++step) {
        const __m256i b = Broadcast<kChunk>(codes + step * kChunk);
        const int8_t* const x = panel + step * vectors * kVectorBytes;
        const __m256i bytes[kSums] = {_mm256_and_si256(b, rows03),
                                      _mm256_gf2p8affine_epi64_epi8(b, rows32, 0),
                                      _mm256_gf2p8affine_epi64_epi8(b, rows21, 0)};
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) {
          const __m256i xv = Load(x + v * kVectorBytes);
#pragma GCC unroll 3
          for (int i = 0; i < kSums; ++i) {
            MultiplyAdd(bytes[i], xv, sum + step % kSets * kCount + i * vectors + v);
          }
        }
      }
      panel += 2 * vectors * kVectorBytes;
      codes += 2 * kChunk;
#pragma GCC unroll 12
      for (__m256i& kept : sum) KeepInPlace(&kept);
    } while (codes != end);
  }

#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    __m256i t[kSums];
#pragma GCC unroll 3
    for (int i = 0; i < kSums; ++i) {
      t[i] = sum[i * vectors + v];
      if constexpr (kSets == 2) t[i] = _mm256_add_epi32(t[i], sum[kCount + i * vectors + v]);
    }
    __m256i row[4];
    Separate(t[0], t[1], t[2], row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      acc->sum[r][v] = first ? row[r] : _mm256_add_epi32(acc->sum[r][v], row[r]);
    }
  }
}

// Blocks of columns keep the activations in L1 for a few row groups.
template <int per_vector, int vectors>
void TileProduct(const ProductArgs& args, const Tile& tile) {
  constexpr int kChunk = kVectorBytes / per_vector;
  constexpr int kMaxGroups = 16;
  const int64_t steps = args.padded_cols / kChunk;
  const int64_t last = (args.row_end + 3) / 4;
  const int64_t block_groups = steps <= kSteps ? kOutputGroups : kMaxGroups;
  // In blocks of columns it is the same columns of other row groups that come next.
  const int64_t ahead = steps <= kSteps ? kAhead : args.padded_cols;
  for (int64_t group = args.row_begin / 4; group < last; group += block_groups) {
    const int groups = static_cast<int>(MinInt(block_groups, last - group));
    RowSums<vectors> acc[kMaxGroups];
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int8_t* panel = args.panel + tile.offset + step * vectors * kVectorBytes;
      const int64_t count = MinInt(kSteps, steps - step);
      for (int g = 0; g < groups; ++g) {
        Accumulate<per_vector, vectors>(args.codes + (group + g) * args.padded_cols + step * kChunk,
                                        panel, count, ahead, step == 0, acc + g);
      }
    }
    for (int g = 0; g < groups; g += kOutputGroups) {
      const int count = static_cast<int>(MinInt(kOutputGroups, groups - g));
      Finish<per_vector, vectors>(args, tile, group + g, count, acc + g);
    }
  }
}

}  // namespace

void Product(const ProductArgs& args) {
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const Tile& tile = args.tiles[i];
    switch (tile.shape.per_vector * tile.shape.vectors) {
      case 1:
        TileProduct<1, 1>(args, tile);
        break;
      case 2:
        TileProduct<1, 2>(args, tile);
        break;
      case 4:
        TileProduct<1, 4>(args, tile);
        break;
      case 6:
        TileProduct<2, 3>(args, tile);
        break;
      case 8:
        TileProduct<2, 4>(args, tile);
        break;
      case 12:
        TileProduct<4, 3>(args, tile);
        break;
      case 16:
        TileProduct<4, 4>(args, tile);
        break;
      case 24:
        TileProduct<8, 3>(args, tile);
        break;
      default:
        TileProduct<8, 4>(args, tile);
        break;
    }
  }
}

}  // namespace mmfree::cpu::avx_vnni
