#include "server/backends/cpu/kernel_choice.h"

#include "server/backends/cpu/product_amx.h"
#include "server/backends/cpu/product_avx_vnni.h"
#include "server/backends/cpu/product_gfni.h"

namespace mmfree::cpu {

#if defined(__x86_64__)
const Kernels& AvxVnniKernels() {
  static const Kernels kKernels = [] {
    Kernels kernels = Avx2Kernels();
    kernels.name = "avx_vnni";
    const TileShape shapes[] = {{1, 1}, {1, 2}, {1, 4}, {2, 3}, {2, 4},
                                {4, 3}, {4, 4}, {8, 3}, {8, 4}};
    kernels.num_shapes = 0;
    for (const TileShape& shape : shapes) kernels.shapes[kernels.num_shapes++] = shape;
    kernels.product = avx_vnni::Product;
    return kernels;
  }();
  return kKernels;
}

const Kernels& GfniKernels() {
  static const Kernels kKernels = [] {
    Kernels kernels = Avx512Kernels();
    kernels.name = "avx512_gfni";
    kernels.product = gfni::Product;
    return kernels;
  }();
  return kKernels;
}

const Kernels& AmxKernels() {
  static const Kernels kKernels = [] {
    Kernels kernels = Avx512Kernels();
    kernels.name = "amx";
    // Above 16 tokens a tile of 32; below, AMX does not gain on the vector kernels.
    int32_t kept = 0;
    while (kernels.shapes[kept].per_vector * kernels.shapes[kept].vectors <= 16) ++kept;
    kernels.shapes[kept] = {16, 2};
    kernels.num_shapes = kept + 1;
    kernels.product = amx::Product;
    return kernels;
  }();
  return kKernels;
}
#endif

const Kernels& KernelsFor(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAmx) return AmxKernels();
  if (isa == CpuIsa::kAvx512Gfni) return GfniKernels();
  if (isa == CpuIsa::kAvx512) return Avx512Kernels();
  if (isa == CpuIsa::kAvxVnni) return AvxVnniKernels();
  if (isa == CpuIsa::kAvx2) return Avx2Kernels();
#endif
  return ScalarKernels();
}

}  // namespace mmfree::cpu
