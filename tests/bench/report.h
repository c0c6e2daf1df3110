// How a benchmark's figures are printed.
#ifndef MMFREE_TESTS_BENCH_REPORT_H_
#define MMFREE_TESTS_BENCH_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "server/backends/backend.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// One run of decode or prefill. Every figure is the fastest round's but the median.
struct StepReport {
  std::string benchmark;
  int32_t threads = 0;
  int32_t tokens = 0;  // per sequence and step
  int64_t steps = 0;   // measured
  double step_us = 0;
  double median_step_us = 0;
  int64_t bytes_per_step = 0;
  double read_bandwidth = 0;               // bytes per second
  std::optional<double> joules_per_token;  // over all measured steps, where the device tells
};

void PrintStepReport(const BenchOptions& options, const BackendInfo& backend,
                     const StepReport& report);

struct KernelReport {
  std::string name;
  double step_us = 0;      // of one step, all layers
  int64_t bytes = 0;       // weights it reads
  int64_t operations = 0;  // multiply-adds of a product, elements of another kernel
};

void PrintKernelReports(const BenchOptions& options, int32_t threads, const std::string& isa,
                        double read_bandwidth, const std::vector<KernelReport>& kernels);

struct LoadReport {
  std::string directory;
  bool packed = false;
  double seconds = 0;
  int64_t ternary_bytes = 0;
  int64_t peak_resident_bytes = 0;
};

// Requests to an engine.
struct EngineReport {
  int64_t requests = 0;
  int64_t tokens = 0;  // of output, of all
  double seconds = 0;  // from the first request to the last end
};

void PrintEngineReport(const BenchOptions& options, const BackendInfo& backend,
                       const EngineReport& report);

void PrintLoadReport(const BenchOptions& options, const LoadReport& report);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_REPORT_H_
