#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AMX_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AMX_H_

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::amx {

// Tile shapes: {16,2}, and those of avx512::Product with per_vector below 16.
void Product(const ProductArgs& args);

}  // namespace mmfree::cpu::amx

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AMX_H_
