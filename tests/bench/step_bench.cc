#include "tests/bench/step_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "server/backends/backend.h"
#include "server/base/status_macros.h"
#include "tests/bench/bench_backend.h"
#include "tests/bench/report.h"

namespace mmfree {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr int32_t kPrefillTokens = 128;
// Rounds of steps, with a measurement of the read bandwidth before each: a disturbed machine shows
// in a few of them only.
constexpr int kRounds = 8;

double Seconds(SteadyClock::duration time) { return std::chrono::duration<double>(time).count(); }

// `tokens` tokens a row and step; the rows go on from their own samples.
class Driver {
 public:
  Driver(Backend* backend, int32_t batch, int32_t tokens, int64_t vocab)
      : backend_(backend), tokens_(batch, std::vector<int32_t>(tokens)), rows_(batch) {
    for (int32_t r = 0; r < batch; ++r) {
      for (int32_t t = 0; t < tokens; ++t) {
        tokens_[r][t] = static_cast<int32_t>((int64_t{7919} * (r * tokens + t) + 1) % vocab);
      }
      rows_[r].slot = r;
      rows_[r].tokens = tokens_[r];
      rows_[r].sampling = &greedy_;
    }
  }

  // Time of one step.
  absl::StatusOr<double> Step() {
    const auto start = SteadyClock::now();
    MMFREE_RETURN_IF_ERROR(backend_->Step(rows_, &output_));
    const double seconds = Seconds(SteadyClock::now() - start);
    for (size_t r = 0; r < rows_.size(); ++r) {
      rows_[r].position += rows_[r].tokens.size();
      tokens_[r].back() = output_.samples[r].token;
    }
    return seconds;
  }

 private:
  Backend* const backend_;
  const SamplingParams greedy_;
  std::vector<std::vector<int32_t>> tokens_;
  std::vector<StepRow> rows_;
  StepOutput output_;
};

absl::Status BenchSteps(const BenchOptions& options, StepReport report) {
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, MakeBenchModel(options));
  MMFREE_ASSIGN_OR_RETURN(
      const std::unique_ptr<Backend> backend,
      MakeBenchBackend(options, model, options.batch, options.batch * report.tokens));
  report.threads = BenchThreads(options);
  report.bytes_per_step = WeightBytesPerStep(*model);
  MMFREE_ASSIGN_OR_RETURN(const BenchProbes probes,
                          MakeBenchProbes(options, report.bytes_per_step));
  Driver driver(backend.get(), options.batch, report.tokens, model->config().vocab_size);

  MMFREE_RETURN_IF_ERROR(driver.Step().status());  // touches every page
  std::vector<double> times;
  double joules = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < 3; ++i)
      report.read_bandwidth = std::max(report.read_bandwidth, probes.read_bandwidth());
    const auto end =
        SteadyClock::now() + std::chrono::duration_cast<SteadyClock::duration>(
                                 std::chrono::duration<double>(options.seconds / kRounds));
    const std::optional<double> energy_before = probes.energy_joules();
    do {
      MMFREE_ASSIGN_OR_RETURN(const double seconds, driver.Step());
      times.push_back(seconds);
    } while (SteadyClock::now() < end);
    if (energy_before.has_value()) joules += probes.energy_joules().value_or(0) - *energy_before;
  }
  report.steps = static_cast<int64_t>(times.size());
  if (joules > 0) {
    report.joules_per_token =
        joules / (static_cast<double>(report.steps) * options.batch * report.tokens);
  }
  std::sort(times.begin(), times.end());
  report.step_us = times.front() * 1e6;
  report.median_step_us = times[times.size() / 2] * 1e6;
  PrintStepReport(options, backend->info(), report);
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchDecode(const BenchOptions& options) {
  StepReport report;
  report.benchmark = "decode";
  report.tokens = 1;
  return BenchSteps(options, report);
}

absl::Status BenchPrefill(const BenchOptions& options) {
  StepReport report;
  report.benchmark = "prefill";
  report.tokens = options.tokens > 0 ? options.tokens : kPrefillTokens;
  return BenchSteps(options, report);
}

}  // namespace mmfree
