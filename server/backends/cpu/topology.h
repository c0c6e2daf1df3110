// The processor's cores, as far as this process may use them.
#ifndef MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_
#define MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_

namespace mmfree::cpu {

// Physical cores in the process's affinity mask, limited by the cgroup's processor quota; at
// least 1.
int AvailablePhysicalCores();

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_TOPOLOGY_H_
