// How GFNI takes four rows of a byte of codes apart for three multiplications (product_gfni.cc has
// the arithmetic): what the files for vectors of 32 and of 64 bytes share. Constants only.
#ifndef MMFREE_SERVER_BACKENDS_CPU_GFNI_ROWS_H_
#define MMFREE_SERVER_BACKENDS_CPU_GFNI_ROWS_H_

#include <cstdint>

namespace mmfree::cpu {

// The matrix of vgf2p8affineqb that makes c_low + 64 c_high of a byte of codes: row i of it, a mask
// of the source bits that bit i of the result is the sum of, is byte 7 - i.
consteval int64_t PairMatrix(int low, int high) {
  uint64_t matrix = 0;
  for (int bit = 0; bit < 2; ++bit) {
    matrix |= uint64_t{1} << (2 * low + bit) << (8 * (7 - bit));
    matrix |= uint64_t{1} << (2 * high + bit) << (8 * (1 - bit));
  }
  return static_cast<int64_t>(matrix);
}

inline constexpr uint8_t kRows03 = 0xc3;  // c0 + 64 c3, by a mask
inline constexpr int64_t kRows32 = PairMatrix(3, 2);
inline constexpr int64_t kRows21 = PairMatrix(2, 1);

// Most columns that a 32-bit sum may have when the rows are separated.
inline constexpr int64_t kChainedColumns = 512;

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_GFNI_ROWS_H_
