#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_H_

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::avx2 {

// Tile shapes: {1,1}, {1,2}, {2,2}, {4,2}, {8,2}.
void Product(const ProductArgs& args);

}  // namespace mmfree::cpu::avx2

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX2_H_
