// Ternary products on AVX-VNNI and GFNI; only where CpuSupports(CpuIsa::kAvxVnni).
#ifndef MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX_VNNI_H_
#define MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX_VNNI_H_

#include "server/backends/cpu/kernels.h"

namespace mmfree::cpu::avx_vnni {

void Product(const ProductArgs& args);

}  // namespace mmfree::cpu::avx_vnni

#endif  // MMFREE_SERVER_BACKENDS_CPU_PRODUCT_AVX_VNNI_H_
