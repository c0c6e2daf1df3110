#include "tests/bench/bench_backend.h"

#include <iostream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/backends/cpu/topology.h"
#ifdef MMFREE_HAVE_CUDA
#include "server/backends/cuda/cuda_backend.h"
#include "server/backends/cuda/gpu_monitor.h"
#include "server/backends/cuda/read_bandwidth.h"
#endif
#include "server/base/status_macros.h"
#include "server/model/config.h"
#include "tests/bench/read_bandwidth.h"

namespace mmfree {
namespace {

constexpr uint64_t kSeed = 1;

absl::Status NotBuiltIn(const BenchOptions& options) {
  return absl::InvalidArgumentError(
      absl::StrCat("--backend=", options.backend, " is not built into this program"));
}

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
#ifdef MMFREE_HAVE_CUDA
  if (options.backend == "cuda") {
    CudaBackendOptions cuda;
    cuda.num_slots = num_slots;
    cuda.max_step_tokens = max_step_tokens;
    return CreateCudaBackend(*model, cuda);
  }
#endif
  return NotBuiltIn(options);
}

absl::StatusOr<BenchProbes> MakeBenchProbes(const BenchOptions& options, int64_t weight_bytes) {
  BenchProbes probes;
  if (options.backend == "cpu") {
    const auto pool = std::make_shared<cpu::ThreadPool>(BenchThreadHomes(options));
    const auto reads = std::make_shared<ReadBandwidth>(weight_bytes, pool.get());
    probes.read_bandwidth = [pool, reads] { return reads->Measure(); };
    probes.energy_joules = [] { return std::nullopt; };
    return probes;
  }
#ifdef MMFREE_HAVE_CUDA
  if (options.backend == "cuda") {
    MMFREE_ASSIGN_OR_RETURN(std::unique_ptr<GpuReadBandwidth> opened,
                            GpuReadBandwidth::Create(/*device=*/0, weight_bytes));
    const std::shared_ptr<GpuReadBandwidth> reads = std::move(opened);
    probes.read_bandwidth = [reads] { return reads->Measure(); };
    absl::StatusOr<std::unique_ptr<GpuMonitor>> found = GpuMonitor::Open(/*device=*/0);
    if (found.ok()) {
      const std::shared_ptr<GpuMonitor> monitor = *std::move(found);
      probes.energy_joules = [monitor] { return monitor->Read().energy_joules; };
    } else {
      std::cerr << "no energy figures: " << found.status().message() << "\n";
      probes.energy_joules = [] { return std::nullopt; };
    }
    return probes;
  }
#endif
  return NotBuiltIn(options);
}

int32_t BenchThreads(const BenchOptions& options) {
  return options.threads > 0 ? options.threads : cpu::AvailablePhysicalCores();
}

std::vector<cpu::Processors> BenchThreadHomes(const BenchOptions& options) {
  return cpu::ThreadHomes(cpu::NumaNodes(cpu::AllowedProcessors()), BenchThreads(options),
                          options.pin_threads);
}

int64_t WeightBytesPerStep(const Model& model) {
  const ModelConfig& config = model.config();
  // Per layer nine vectors of the hidden size and one of the intermediate size, and two at the end.
  const int64_t floats = config.num_layers * (9 * config.hidden_size + config.intermediate_size) +
                         2 * config.hidden_size;
  return model.ternary_bytes() + floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace mmfree
