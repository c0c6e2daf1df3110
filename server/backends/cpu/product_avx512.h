#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_H_

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::avx512 {

// Tile shapes: {1,1}, {1,2}, {1,4}, {2,3}, {2,4}, {4,3}, {4,4}, {8,3}, {8,4}, {16,3}, {16,4}.
void Product(const ProductArgs& args);

}  // namespace mmfree::cpu::avx512

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX512_H_
