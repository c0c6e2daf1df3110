// Instruction sets of the processor at hand.
#ifndef MMFREE_SERVER_BASE_CPU_FEATURES_H_
#define MMFREE_SERVER_BASE_CPU_FEATURES_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// In rising order of preference. kScalar is the oracle: portable C++, the definition of every
// result.
enum class CpuIsa {
  kScalar,
  kAvx2,        // AVX2, FMA, F16C
  kAvxVnni,     // the same, AVX-VNNI and GFNI
  kAvx512,      // AVX-512 F, BW, VL, DQ, VNNI
  kAvx512Gfni,  // the same and GFNI
  kAmx,         // the same and AMX int8, which Linux grants a process on request
};

// "scalar", "avx2", "avx_vnni", "avx512", "avx512_gfni", "amx".
absl::string_view CpuIsaName(CpuIsa isa);

// Whether this processor and its operating system can run `isa`.
bool CpuSupports(CpuIsa isa);

// Parses "auto" (the best this processor supports) or the name of one.
// INVALID_ARGUMENT for another word; FAILED_PRECONDITION when this processor lacks what was asked
// for.
absl::StatusOr<CpuIsa> SelectCpuIsa(absl::string_view name);

// The processor's model name, e.g. "AMD EPYC 7763 64-Core Processor"; "unknown" when it cannot be
// read.
std::string CpuModelName();

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_CPU_FEATURES_H_
