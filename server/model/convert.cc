#include "server/model/convert.h"

#include <cmath>
#include <cstring>

#include "server/base/numerics.h"

namespace mmfree {
namespace {

// The loops gather a flag instead of branching, so that they vectorise.

bool ConvertF32(const uint8_t* data, int64_t n, float* out) {
  memcpy(out, data, static_cast<size_t>(n) * sizeof(float));
  uint32_t bad = 0;
  for (int64_t k = 0; k < n; ++k) bad |= (FloatToBits(out[k]) & 0x7f800000u) == 0x7f800000u;
  return bad == 0;
}

bool ConvertF16(const uint8_t* data, int64_t n, float* out) {
  uint32_t bad = 0;
  for (int64_t k = 0; k < n; ++k) {
    uint16_t half;
    memcpy(&half, data + 2 * k, sizeof(half));
    bad |= (half & 0x7c00u) == 0x7c00u;
    // The exponent's bias differs by 112; scaling by 2^112 is exact, subnormals included.
    const float magnitude = BitsToFloat(static_cast<uint32_t>(half & 0x7fffu) << 13) * 0x1p112f;
    out[k] = BitsToFloat(FloatToBits(magnitude) | (static_cast<uint32_t>(half & 0x8000u) << 16));
  }
  return bad == 0;
}

bool ConvertBF16(const uint8_t* data, int64_t n, float* out) {
  uint32_t bad = 0;
  for (int64_t k = 0; k < n; ++k) {
    uint16_t value;
    memcpy(&value, data + 2 * k, sizeof(value));
    bad |= (value & 0x7f80u) == 0x7f80u;
    out[k] = Bfloat16ToFloat(value);
  }
  return bad == 0;
}

}  // namespace

bool ConvertToFloat(TensorType type, const uint8_t* data, int64_t n, float* out) {
  switch (type) {
    case TensorType::kF32:
      return ConvertF32(data, n, out);
    case TensorType::kF16:
      return ConvertF16(data, n, out);
    case TensorType::kBF16:
      return ConvertBF16(data, n, out);
    case TensorType::kU8:
    case TensorType::kI32:
      break;
  }
  return false;
}

double RowAbsSum(const float* row, int64_t n) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(std::fabs(row[k + lane]));
    }
  }
  for (; k < n; ++k) lanes[k % kLanes] += static_cast<double>(std::fabs(row[k]));
  for (int lane = 1; lane < kLanes; ++lane) lanes[0] += lanes[lane];
  return lanes[0];
}

}  // namespace mmfree
