#include "server/base/cpu_features.h"

#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <fstream>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

bool HasAvxVnni() {
#if defined(__x86_64__)
  constexpr unsigned kAvxVnni = 1u << 4;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
#else
  return false;
#endif
}

bool HasAmxInt8() {
#if defined(__x86_64__)
  constexpr unsigned kTile = 1u << 24;
  constexpr unsigned kInt8 = 1u << 25;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTile) != 0 &&
         (edx & kInt8) != 0;
#else
  return false;
#endif
}

// Linux saves the large tile state only for a process that has asked for it (Documentation/arch/
// x86/xstate.rst); every thread of the process may then use it.
bool AmxIsGranted() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

absl::string_view CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kScalar:
      return "scalar";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvxVnni:
      return "avx_vnni";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Gfni:
      return "avx512_gfni";
    case CpuIsa::kAmx:
      return "amx";
  }
  return "unknown";
}

bool CpuSupports(CpuIsa isa) {
  // __builtin_cpu_supports checks that the operating system saves the registers, too.
  switch (isa) {
    case CpuIsa::kScalar:
      return true;
    case CpuIsa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case CpuIsa::kAvxVnni:
      return CpuSupports(CpuIsa::kAvx2) && HasAvxVnni() && __builtin_cpu_supports("gfni");
    case CpuIsa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case CpuIsa::kAvx512Gfni:
      return CpuSupports(CpuIsa::kAvx512) && __builtin_cpu_supports("gfni");
    case CpuIsa::kAmx:
      return CpuSupports(CpuIsa::kAvx512Gfni) && HasAmxInt8() && AmxIsGranted();
  }
  return false;
}

absl::StatusOr<CpuIsa> SelectCpuIsa(absl::string_view name) {
  constexpr CpuIsa kAll[] = {CpuIsa::kAmx,     CpuIsa::kAvx512Gfni, CpuIsa::kAvx512,
                             CpuIsa::kAvxVnni, CpuIsa::kAvx2,       CpuIsa::kScalar};
  for (CpuIsa isa : kAll) {
    if (name == "auto" && CpuSupports(isa)) return isa;
    if (name != CpuIsaName(isa)) continue;
    if (CpuSupports(isa)) return isa;
    return absl::FailedPreconditionError(
        absl::StrCat("cpu_isa=", name, ": this processor (", CpuModelName(),
                     ") does not have that instruction set; use cpu_isa=auto"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "cpu_isa=", name, ": expected auto, scalar, avx2, avx_vnni, avx512, avx512_gfni or amx"));
}

std::string CpuModelName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

}  // namespace mmfree
