// binary32 to the 16-bit formats of exported states, rounding to nearest even. The way back is
// exact (server/model/convert.h).
#ifndef MMFREE_SERVER_SESSIONS_HALF_H_
#define MMFREE_SERVER_SESSIONS_HALF_H_

#include <cstdint>

#include "server/base/numerics.h"

namespace mmfree {

// IEEE binary16. Too large gives the largest finite value, so that a state stays finite.
inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  constexpr uint32_t kLargest = 0x7bffu;  // 65504
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | kLargest);
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves that many fraction bits.
    const float rounded = BitsToFloat(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (FloatToBits(rounded) - FloatToBits(0.5f)));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}

// bfloat16. Too large gives the largest finite value.
inline uint16_t FloatToBfloat16(float value) {
  const uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) >= 0x7f7f8000u)
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7f7fu);
  const uint32_t odd = (bits >> 16) & 1u;
  return static_cast<uint16_t>((bits + 0x7fffu + odd) >> 16);
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_HALF_H_
