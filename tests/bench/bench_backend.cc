#include "tests/bench/bench_backend.h"

#include <iostream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/backends/cpu/topology.h"
#include "server/base/status_macros.h"
#include "server/model/config.h"

namespace mmfree {
namespace {

constexpr uint64_t kSeed = 1;

}  // namespace

absl::StatusOr<std::shared_ptr<const Model>> MakeBenchModel(const BenchOptions& options) {
  MMFREE_ASSIGN_OR_RETURN(const ModelConfig config, ConfigForShape(options.shape));
  std::cerr << "making random " << options.shape << " weights ... " << std::flush;
  const absl::Time start = absl::Now();
  std::shared_ptr<const Model> model = Model::Random(config, kSeed);
  std::cerr << absl::StreamFormat("%.0f MB of ternary codes in %.1f s\n",
                                  static_cast<double>(model->ternary_bytes()) * 1e-6,
                                  absl::ToDoubleSeconds(absl::Now() - start));
  return model;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBenchBackend(const BenchOptions& options,
                                                          std::shared_ptr<const Model> model,
                                                          int32_t num_slots,
                                                          int32_t max_step_tokens) {
  if (options.backend == "cpu") {
    CpuBackendOptions cpu;
    cpu.isa = options.cpu_isa;
    cpu.threads = BenchThreads(options);
    cpu.pin_threads = options.pin_threads;
    cpu.num_slots = num_slots;
    cpu.max_step_tokens = max_step_tokens;
    return CreateCpuBackend(std::move(model), cpu);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--backend=", options.backend, " is not built into this program"));
}

int32_t BenchThreads(const BenchOptions& options) {
  return options.threads > 0 ? options.threads : cpu::AvailablePhysicalCores();
}

int64_t WeightBytesPerStep(const Model& model) {
  const ModelConfig& config = model.config();
  // Per layer nine vectors of the hidden size and one of the intermediate size, and two at the end.
  const int64_t floats = config.num_layers * (9 * config.hidden_size + config.intermediate_size) +
                         2 * config.hidden_size;
  return model.ternary_bytes() + floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace mmfree
