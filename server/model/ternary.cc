#include "server/model/ternary.h"

#include <algorithm>
#include <cstring>

namespace mmfree {
namespace {

// The reference clamps the mean of |W| at this value.
constexpr float kMinScale = 1e-5f;

}  // namespace

float TernaryScale(double sum_abs, int64_t count) {
  return std::max(static_cast<float>(sum_abs / static_cast<double>(count)), kMinScale);
}

void PackRowGroup(absl::Span<const float* const> rows, int64_t cols, float scale, uint8_t* out) {
  memset(out, kTernaryZeroByte, TernaryMatrix::PaddedCols(cols));
  for (size_t j = 0; j < rows.size(); ++j) {
    const float* const row = rows[j];
    const int shift = static_cast<int>(2 * j);
    // 0x55 holds code 1 in the row's two bits; adding w there cannot carry or borrow.
    for (int64_t k = 0; k < cols; ++k) {
      out[k] = static_cast<uint8_t>(out[k] + TernaryWeight(row[k], scale) * (1 << shift));
    }
  }
}

void ClearTernaryPadding(int64_t rows, int64_t cols, uint8_t* codes) {
  const int64_t padded = TernaryMatrix::PaddedCols(cols);
  const int64_t groups = TernaryMatrix::RowGroups(rows);
  if (padded != cols) {
    for (int64_t g = 0; g < groups; ++g) {
      memset(codes + g * padded + cols, kTernaryZeroByte, padded - cols);
    }
  }
  const int64_t used = rows % kTernaryRowGroup;
  if (used != 0) {
    const uint8_t keep = static_cast<uint8_t>((1 << (2 * used)) - 1);
    uint8_t* const last = codes + (groups - 1) * padded;
    for (int64_t k = 0; k < padded; ++k) {
      last[k] = static_cast<uint8_t>((last[k] & keep) | (kTernaryZeroByte & ~keep));
    }
  }
}

bool ValidTernaryCodes(int64_t rows, int64_t cols, const uint8_t* codes) {
  const int64_t padded = TernaryMatrix::PaddedCols(cols);
  const int64_t groups = TernaryMatrix::RowGroups(rows);
  unsigned bad = 0;
  for (int64_t k = 0; k < groups * padded; ++k) {
    bad |= codes[k] & (static_cast<unsigned>(codes[k]) >> 1) & kTernaryZeroByte;
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t k = cols; k < padded; ++k) bad |= codes[g * padded + k] ^ kTernaryZeroByte;
  }
  if (const int64_t used = rows % kTernaryRowGroup; used != 0) {
    const unsigned padding = 0xffu << (2 * used) & 0xffu;
    const uint8_t* const last = codes + (groups - 1) * padded;
    for (int64_t k = 0; k < padded; ++k) bad |= (last[k] ^ kTernaryZeroByte) & padding;
  }
  return bad == 0;
}

}  // namespace mmfree
