#include "tests/bench/load_bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>

#include "absl/status/status.h"
#include "server/base/status_macros.h"
#include "server/model/model.h"
#include "tests/bench/report.h"

namespace mmfree {

absl::Status BenchLoad(const BenchOptions& options) {
  if (options.model.empty()) {
    return absl::InvalidArgumentError("load_model: name the directory with --model=DIR");
  }
  using Clock = std::chrono::steady_clock;
  LoadReport report;
  report.directory = options.model;
  report.seconds = std::numeric_limits<double>::infinity();
  const auto end = Clock::now() + std::chrono::duration<double>(options.seconds);
  do {
    const auto start = Clock::now();
    MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, Model::Load(options.model));
    const std::chrono::duration<double> time = Clock::now() - start;
    report.seconds = std::min(report.seconds, time.count());
    report.packed = model->packed();
    report.ternary_bytes = model->ternary_bytes();
  } while (Clock::now() < end);
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  report.peak_resident_bytes = int64_t{1024} * usage.ru_maxrss;
  PrintLoadReport(options, report);
  return absl::OkStatus();
}

}  // namespace mmfree
