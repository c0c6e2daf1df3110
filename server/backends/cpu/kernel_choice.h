// The kernels of an instruction set.
#ifndef MMFREE_SERVER_BACKENDS_CPU_KERNEL_CHOICE_H_
#define MMFREE_SERVER_BACKENDS_CPU_KERNEL_CHOICE_H_

#include "server/backends/cpu/kernels.h"
#include "server/base/cpu_features.h"

namespace mmfree::cpu {

// `isa` must be supported by this processor.
const Kernels& KernelsFor(CpuIsa isa);

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_KERNEL_CHOICE_H_
