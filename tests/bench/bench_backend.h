// Models and backends for the benchmarks.
#ifndef MMFREE_TESTS_BENCH_BENCH_BACKEND_H_
#define MMFREE_TESTS_BENCH_BENCH_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "server/backends/backend.h"
#include "server/backends/cpu/topology.h"
#include "server/model/model.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// Random weights of options.shape, made in memory; says so on stderr.
absl::StatusOr<std::shared_ptr<const Model>> MakeBenchModel(const BenchOptions& options);

// options.backend over `model`; INVALID_ARGUMENT for a backend that is not built in.
absl::StatusOr<std::unique_ptr<Backend>> MakeBenchBackend(const BenchOptions& options,
                                                          std::shared_ptr<const Model> model,
                                                          int32_t num_slots,
                                                          int32_t max_step_tokens);

// What the limits and the energy of a backend are measured with.
struct BenchProbes {
  std::function<double()> read_bandwidth;  // one pass of plain reads, bytes per second
  std::function<std::optional<double>()> energy_joules;  // used so far, where the device tells
};
// `weight_bytes` of the step; the processor's reads are by as many threads as its backend has.
absl::StatusOr<BenchProbes> MakeBenchProbes(const BenchOptions& options, int64_t weight_bytes);

// options.threads, or what 0 stands for.
int32_t BenchThreads(const BenchOptions& options);
// Where these threads may run (server/backends/cpu/topology.h).
std::vector<cpu::Processors> BenchThreadHomes(const BenchOptions& options);

// Bytes of weights that one step reads at least: every ternary matrix and norm once.
int64_t WeightBytesPerStep(const Model& model);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_BENCH_BACKEND_H_
