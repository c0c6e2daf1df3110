#include "server/backends/cpu/topology.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <string>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace mmfree::cpu {
namespace {

// Processors of the affinity mask, counting those that share a core once.
int CoresInAffinityMask() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return static_cast<int>(std::thread::hardware_concurrency());
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    // The same text for every processor of a core, e.g. "0,64".
    std::ifstream file(
        absl::StrCat("/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = absl::StrCat("cpu", cpu);
    cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
}

// Processors' worth of time that cgroup v2 grants, e.g. "200000 100000" for two.
double CgroupQuota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  std::string period;
  double quota_us = 0;
  double period_us = 0;
  if (file >> quota >> period && absl::SimpleAtod(quota, &quota_us) &&
      absl::SimpleAtod(period, &period_us) && quota_us > 0 && period_us > 0) {
    return quota_us / period_us;
  }
  return std::numeric_limits<double>::infinity();
}

}  // namespace

int AvailablePhysicalCores() {
  const int cores = CoresInAffinityMask();
  const double quota = std::ceil(CgroupQuota());
  return std::max(1, quota < cores ? static_cast<int>(quota) : cores);
}

}  // namespace mmfree::cpu
