#include "tests/bench/report.h"

#include <iostream>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "server/base/cpu_features.h"

namespace mmfree {

void PrintStepReport(const BenchOptions& options, const BackendInfo& backend,
                     const StepReport& report) {
  const double tokens_per_s = 1e6 * options.batch * report.tokens / report.step_us;
  const double share =
      static_cast<double>(report.bytes_per_step) / (report.step_us * 1e-6) / report.read_bandwidth;
  // Four weights a byte, a multiply and an add each; norms and vectors do not count.
  const double tera_operations = static_cast<double>(report.bytes_per_step) * 8.0 * options.batch *
                                 report.tokens / report.step_us * 1e-6;
  if (options.json) {
    nlohmann::ordered_json json = {
        {"benchmark", report.benchmark},
        {"shape", options.shape},
        {"backend", backend.name},
        {"description", backend.description},
        {"processor", CpuModelName()},
        {"threads", report.threads},
        {"batch", options.batch},
        {"tokens", report.tokens},
        {"steps", report.steps},
        {"tokens_per_s", tokens_per_s},
        {"step_us", report.step_us},
        {"median_step_us", report.median_step_us},
        {"bytes_per_step", report.bytes_per_step},
        {"read_bandwidth_gb_s", report.read_bandwidth * 1e-9},
        {"bandwidth_share", share},
        {"tera_operations_per_s", tera_operations},
        {"weight_bytes", backend.weight_bytes},
        {"state_bytes", backend.state_bytes},
    };
    if (report.joules_per_token.has_value()) json["joules_per_token"] = *report.joules_per_token;
    std::cout << json.dump() << std::endl;
    return;
  }
  std::cout << absl::StreamFormat(
                   "%s %s, batch %d, %d token%s a row: %s (%s), %s\n"
                   "  %10.1f tokens/s\n"
                   "  %10.1f us a step (median %.1f) of %d steps\n"
                   "  %10.1f MB of weights a step, %.2f GB/s\n"
                   "  %10.2f GB/s plain reads in the same run\n"
                   "  %10.1f %% of them\n",
                   report.benchmark, options.shape, options.batch, report.tokens,
                   report.tokens == 1 ? "" : "s", backend.name, backend.description, CpuModelName(),
                   tokens_per_s, report.step_us, report.median_step_us, report.steps,
                   static_cast<double>(report.bytes_per_step) * 1e-6,
                   static_cast<double>(report.bytes_per_step) / report.step_us * 1e-3,
                   report.read_bandwidth * 1e-9, share * 100)
            << std::flush;
  if (report.joules_per_token.has_value()) {
    std::cout << absl::StreamFormat("  %10.4f J a token\n", *report.joules_per_token) << std::flush;
  }
}

void PrintKernelReports(const BenchOptions& options, int32_t threads, const std::string& isa,
                        double read_bandwidth, const std::vector<KernelReport>& kernels) {
  double total = 0;
  for (const KernelReport& kernel : kernels) total += kernel.step_us;
  if (options.json) {
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    for (const KernelReport& kernel : kernels) {
      const double bandwidth = static_cast<double>(kernel.bytes) / kernel.step_us * 1e6;
      rows.push_back(
          {{"kernel", kernel.name},
           {"us", kernel.step_us},
           {"step_share", kernel.step_us / total},
           {"bytes", kernel.bytes},
           {"bandwidth_share", bandwidth / read_bandwidth},
           {"operations", kernel.operations},
           {"operations_per_s", static_cast<double>(kernel.operations) / kernel.step_us * 1e6}});
    }
    const nlohmann::ordered_json json = {{"benchmark", "kernels"},
                                         {"shape", options.shape},
                                         {"cpu_isa", isa},
                                         {"processor", CpuModelName()},
                                         {"threads", threads},
                                         {"batch", options.batch},
                                         {"read_bandwidth_gb_s", read_bandwidth * 1e-9},
                                         {"kernels", rows}};
    std::cout << json.dump() << std::endl;
    return;
  }
  std::cout << absl::StreamFormat(
      "kernels of a step, %s, %d token%s: %s, %d threads, %s\n"
      "plain reads: %.2f GB/s\n\n"
      "%-18s %10s %7s %9s %8s %8s %10s\n",
      options.shape, options.batch, options.batch == 1 ? "" : "s", isa, threads, CpuModelName(),
      read_bandwidth * 1e-9, "kernel", "us", "step", "MB", "GB/s", "of reads", "Gop/s");
  for (const KernelReport& kernel : kernels) {
    const double bandwidth = static_cast<double>(kernel.bytes) / kernel.step_us * 1e6;
    std::cout << absl::StreamFormat("%-18s %10.1f %6.1f%% %9.2f %8.2f %7.1f%% %10.2f\n",
                                    kernel.name, kernel.step_us, 100 * kernel.step_us / total,
                                    static_cast<double>(kernel.bytes) * 1e-6, bandwidth * 1e-9,
                                    100 * bandwidth / read_bandwidth,
                                    static_cast<double>(kernel.operations) / kernel.step_us * 1e-3);
  }
  std::cout << absl::StreamFormat("%-18s %10.1f\n", "sum", total) << std::flush;
}

void PrintEngineReport(const BenchOptions& options, const BackendInfo& backend,
                       const EngineReport& report) {
  const double rate = static_cast<double>(report.tokens) / report.seconds;
  if (options.json) {
    const nlohmann::ordered_json json = {
        {"benchmark", "engine"},        {"model", options.model},
        {"backend", backend.name},      {"description", backend.description},
        {"concurrency", options.batch}, {"requests", report.requests},
        {"tokens", report.tokens},      {"seconds", report.seconds},
        {"tokens_per_s", rate}};
    std::cout << json.dump() << std::endl;
    return;
  }
  std::cout << absl::StreamFormat(
                   "engine %s on %s: %d requests, %d at a time: %d tokens in %.3f s, %.0f "
                   "tokens/s\n",
                   options.model, backend.description, report.requests, options.batch,
                   report.tokens, report.seconds, rate)
            << std::flush;
}

void PrintLoadReport(const BenchOptions& options, const LoadReport& report) {
  if (options.json) {
    const nlohmann::ordered_json json = {{"benchmark", "load_model"},
                                         {"model", report.directory},
                                         {"form", report.packed ? "packed" : "published"},
                                         {"seconds", report.seconds},
                                         {"ternary_bytes", report.ternary_bytes},
                                         {"peak_resident_bytes", report.peak_resident_bytes}};
    std::cout << json.dump() << std::endl;
    return;
  }
  std::cout << absl::StreamFormat(
                   "load_model %s (%s): %.3f s, %.1f MB of ternary codes, peak memory %.1f MB\n",
                   report.directory, report.packed ? "packed" : "published", report.seconds,
                   static_cast<double>(report.ternary_bytes) * 1e-6,
                   static_cast<double>(report.peak_resident_bytes) * 1e-6)
            << std::flush;
}

}  // namespace mmfree
