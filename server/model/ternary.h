// Ternary matrices: the 2-bit form that is stored on disk, mapped into memory and read in place by
// the CPU kernels (server/model/FORMAT.md).
//
// Rows are grouped by four. Byte k of group g holds column k of rows 4g .. 4g+3, row 4g+j in bits
// [2j, 2j+2), each as the code w + 1 in {0, 1, 2}. Columns are padded to a multiple of 64 and rows
// to a multiple of 4 with code 1 (weight 0). A product is then sum_k code_k q_k - sum_k q_k.
#ifndef MMFREE_SERVER_MODEL_TERNARY_H_
#define MMFREE_SERVER_MODEL_TERNARY_H_

#include <cstdint>

#include "absl/types/span.h"

namespace mmfree {

inline constexpr int64_t kTernaryRowGroup = 4;
inline constexpr int64_t kTernaryColumnAlign = 64;
inline constexpr uint8_t kTernaryZeroByte = 0x55;  // four weights of 0

// A view; the codes belong to the model's mapping or buffer.
struct TernaryMatrix {
  int64_t rows = 0;                // N, outputs
  int64_t cols = 0;                // K, inputs
  float scale = 0.0f;              // s: the dense weight is s * code
  const uint8_t* codes = nullptr;  // [row_groups(), padded_cols()], 64-byte aligned

  static constexpr int64_t PaddedCols(int64_t cols) {
    return (cols + kTernaryColumnAlign - 1) / kTernaryColumnAlign * kTernaryColumnAlign;
  }
  static constexpr int64_t RowGroups(int64_t rows) {
    return (rows + kTernaryRowGroup - 1) / kTernaryRowGroup;
  }
  static constexpr int64_t Bytes(int64_t rows, int64_t cols) {
    return RowGroups(rows) * PaddedCols(cols);
  }

  int64_t padded_cols() const { return PaddedCols(cols); }
  int64_t row_groups() const { return RowGroups(rows); }
  int64_t bytes() const { return Bytes(rows, cols); }

  // The weight at (row, col): -1, 0 or 1.
  int Weight(int64_t row, int64_t col) const {
    const uint8_t byte = codes[row / kTernaryRowGroup * padded_cols() + col];
    return ((byte >> (2 * (row % kTernaryRowGroup))) & 3) - 1;
  }
};

// s of a matrix whose absolute weights sum to `sum_abs`: max(float(sum_abs / count), 1e-5).
float TernaryScale(double sum_abs, int64_t count);

// clamp(round_half_even(w / scale), -1, 1), the division rounded to binary32.
inline int TernaryWeight(float w, float scale) {
  const float ratio = w / scale;
  return static_cast<int>(ratio > 0.5f) - static_cast<int>(ratio < -0.5f);
}

// Packs one row group. rows: 1 to 4 pointers to `cols` dense weights; a missing row and the columns
// beyond `cols` become weight 0. out: [PaddedCols(cols)].
void PackRowGroup(absl::Span<const float* const> rows, int64_t cols, float scale, uint8_t* out);

// Sets the padding of a matrix (columns from `cols` on, rows from `rows` on) to weight 0.
// codes: [RowGroups(rows), PaddedCols(cols)].
void ClearTernaryPadding(int64_t rows, int64_t cols, uint8_t* codes);

// Whether every code is 0, 1 or 2 and the padding is weight 0.
bool ValidTernaryCodes(int64_t rows, int64_t cols, const uint8_t* codes);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_TERNARY_H_
