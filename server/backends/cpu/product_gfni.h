#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_GFNI_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_GFNI_H_

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::gfni {

// Tile shapes as avx512::Product.
void Product(const ProductArgs& args);

}  // namespace mmfree::cpu::gfni

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_GFNI_H_
