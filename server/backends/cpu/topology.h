// The processor's cores and memory nodes, as far as this process may use them.
#ifndef MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_
#define MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mmfree::cpu {

// Processors by the system's numbers, rising.
using Processors = std::vector<int>;

// Where the system describes each processor.
inline constexpr char kProcessorDirectory[] = "/sys/devices/system/cpu";

// Physical cores in the process's affinity mask, limited by ProcessorQuota; at least 1.
int AvailablePhysicalCores();

// Processors' worth of time that the process's control groups grant, of versions 1 and 2: the least
// of those that `membership` names, under `groups`. Infinite without a limit.
double ProcessorQuota(const std::string& groups = "/sys/fs/cgroup",
                      const std::string& membership = "/proc/self/cgroup");

// The processors of the calling thread's affinity mask; empty when it cannot be read.
Processors AllowedProcessors();

// Parses the kernel's list format, e.g. "0-3,8,10-11". False when it is something else.
bool ParseProcessorList(absl::string_view text, Processors* processors);

// `processors` so that the first ones of each physical core come before the second ones, and so on,
// as the folders cpuN of `directory` tell; one that has no such folder is a core of its own.
Processors CoresFirst(const Processors& processors,
                      const std::string& directory = kProcessorDirectory);

// `allowed` by memory (NUMA) node, as the folders nodeN of `directory` tell; nodes that have none
// of them are left out. One node of all when the folders do not tell.
std::vector<Processors> NumaNodes(const Processors& allowed,
                                  const std::string& directory = "/sys/devices/system/node");

// Where each of `threads` threads may run. The threads of a node are consecutive, and as many as
// its share of the processors. With `pin`, each has one processor of its own as long as there are
// enough, the first ones of the node (CoresFirst). An empty set is no restriction: all of them
// without `pin` on a single node.
std::vector<Processors> ThreadHomes(const std::vector<Processors>& nodes, int threads, bool pin,
                                    const std::string& directory = kProcessorDirectory);

// For thread `index` of a pool, whose threads run on the processors `current`: -1 when no thread
// before it is on the same processor, or there is no better one; else the first of `home` that no
// thread is on.
int FreeProcessor(absl::Span<const int> current, int index, const Processors& home);

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_
