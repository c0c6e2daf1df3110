// Published weights to fp32, and the sum that a matrix's scale is made from.
#ifndef MMFREE_SERVER_MODEL_CONVERT_H_
#define MMFREE_SERVER_MODEL_CONVERT_H_

#include <cstdint>

#include "server/model/safetensors.h"

namespace mmfree {

// Converts n little-endian values of type F32, F16 or BF16, exactly. `data` needs no alignment.
// False when one of them is infinite or NaN; its output is then unspecified.
bool ConvertToFloat(TensorType type, const uint8_t* data, int64_t n, float* out);

// Sum of |w| over one row: element k is added to lane k % 8 in binary64, in rising order of k; then
// the lanes are added to lane 0 in rising order.
double RowAbsSum(const float* row, int64_t n);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_CONVERT_H_
