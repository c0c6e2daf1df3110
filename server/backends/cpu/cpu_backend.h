// The CPU backend: the model on the processor's own cores (kernels.h lists the instruction sets).
//
// Every instruction set and every thread count gives the same bytes (server/model/NUMERICS.md); the
// scalar kernels are the definition.
#ifndef MMFREE_SERVER_BACKENDS_CPU_CPU_BACKEND_H_
#define MMFREE_SERVER_BACKENDS_CPU_CPU_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/backends/backend.h"
#include "server/model/model.h"

namespace mmfree {

struct CpuBackendOptions {
  // "auto" (the best this processor has), "scalar", "avx2", "avx_vnni", "avx512",
  // "avx512_gfni" or "amx".
  std::string isa = "auto";
  // Threads that compute a step, the caller of Step among them. 0: one for each physical core that
  // the process may run on (affinity mask and cgroup quota).
  int32_t threads = 0;
  // Binds each thread to a core of its own, the caller of Step for as long as it takes.
  bool pin_threads = false;
  // Where the processors belong to several memory (NUMA) nodes: keep each thread to one of them,
  // and a copy of the weights that it multiplies there. The copy takes as much memory as the
  // weights.
  bool numa = true;
  // The processors of each node; empty: as the system says.
  std::vector<std::vector<int>> numa_nodes = {};
  // State slots; each takes num_layers * hidden_size floats once it is used.
  int32_t num_slots = 64;
  // Tokens summed over the rows of one step. Scratch memory does not grow with it.
  int32_t max_step_tokens = 1024;
};

// Reads the weights in place from `model`, which lives as long as the backend, or copies them
// (`numa`). INVALID_ARGUMENT for
// an option out of range or a model too wide for the kernels' 32-bit sums; FAILED_PRECONDITION when
// the processor lacks the instruction set asked for.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(std::shared_ptr<const Model> model,
                                                          const CpuBackendOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_BACKENDS_CPU_CPU_BACKEND_H_
