// mmfree-bench: how fast a backend is, against what the machine allows.
#include <iostream>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "tests/bench/bench_options.h"
#include "tests/bench/engine_bench.h"
#include "tests/bench/kernel_bench.h"
#include "tests/bench/load_bench.h"
#include "tests/bench/step_bench.h"

ABSL_FLAG(std::string, backend, "cpu", "backend to measure: cpu or cuda");
ABSL_FLAG(std::string, shape, "370m", "model shape: tales, 370m, 1.3b, 2.7b or 13b");
ABSL_FLAG(std::string, cpu_isa, "auto",
          "cpu: auto, scalar, avx2, avx_vnni, avx512, avx512_gfni or amx");
ABSL_FLAG(std::string, model, "", "load_model, engine: the model directory");
ABSL_FLAG(int32_t, threads, 0, "threads; 0: one for each physical core");
ABSL_FLAG(int32_t, batch, 1, "sequences in a step; engine: requests at a time");
ABSL_FLAG(int32_t, tokens, 0,
          "prefill: tokens of each sequence; 0: 128. engine: of each prompt; 0: 32");
ABSL_FLAG(int32_t, max_tokens, 128, "engine: tokens of output of each request");
ABSL_FLAG(int32_t, requests, 0, "engine: in all; 0: four times --batch");
ABSL_FLAG(int32_t, step_token_budget, 1024, "engine: tokens of one step over all requests");
ABSL_FLAG(double, seconds, 5, "how long to measure");
ABSL_FLAG(bool, pin_threads, false, "bind each thread to a core");
ABSL_FLAG(bool, json, false, "print one JSON object");

namespace {

constexpr char kHelp[] = R"(mmfree-bench: measures a backend on seeded random ternary weights.

  mmfree-bench decode     [--shape=370m] [--batch=1]    one token a step for each sequence
  mmfree-bench prefill    [--shape=370m] [--tokens=128] a prompt a step
  mmfree-bench kernels    [--shape=370m] [--batch=1]    each operation of a step by itself
  mmfree-bench load_model --model=DIR                   loading a model directory
  mmfree-bench engine     --model=DIR [--batch=256]     requests to an engine in this process

  --backend=cpu           backend to measure: cpu, or cuda where it is built in
  --shape=NAME            tales, 370m, 1.3b, 2.7b or 13b
  --cpu_isa=auto          auto, scalar, avx2, avx_vnni, avx512, avx512_gfni or amx
  --threads=0             0: one for each physical core
  --pin_threads           bind each thread to a core
  --batch=1               sequences in a step; engine: requests at a time
  --tokens=0              prefill: tokens of each sequence (0: 128); engine: of each prompt (0: 32)
  --max_tokens=128        engine: tokens of output of each request
  --requests=0            engine: in all; 0: four times --batch
  --step_token_budget=1024  engine: tokens of one step over all requests
  --seconds=5             how long to measure
  --json                  print one JSON object

decode, prefill and kernels also measure the bandwidth of plain reads in the same run, with the same
threads or on the same GPU, over a buffer as large as the weights (and several times the last-level
cache). Times are
those of the fastest step, bandwidths those of the fastest pass: other work on the machine slows
single steps. decode's bandwidth_share says how much of the plain reads' bandwidth the weights were
read with; with several tokens a step, arithmetic and not memory is the limit.

engine is what mmfree-load asks of a server, without the server: the ratio of the two is the cost of
RPC. It is measured once, over all requests.
)";

absl::Status Run(const std::vector<char*>& arguments) {
  if (arguments.size() != 2) {
    return absl::InvalidArgumentError(
        "expected one of decode, prefill, kernels, load_model and engine");
  }
  mmfree::BenchOptions options;
  options.backend = absl::GetFlag(FLAGS_backend);
  options.shape = absl::GetFlag(FLAGS_shape);
  options.cpu_isa = absl::GetFlag(FLAGS_cpu_isa);
  options.model = absl::GetFlag(FLAGS_model);
  options.threads = absl::GetFlag(FLAGS_threads);
  options.batch = absl::GetFlag(FLAGS_batch);
  options.tokens = absl::GetFlag(FLAGS_tokens);
  options.max_tokens = absl::GetFlag(FLAGS_max_tokens);
  options.requests = absl::GetFlag(FLAGS_requests);
  options.step_token_budget = absl::GetFlag(FLAGS_step_token_budget);
  options.seconds = absl::GetFlag(FLAGS_seconds);
  options.pin_threads = absl::GetFlag(FLAGS_pin_threads);
  options.json = absl::GetFlag(FLAGS_json);
  if (options.threads < 0 || options.threads > 1024) {
    return absl::InvalidArgumentError("--threads: expected 0 to 1024");
  }
  if (options.batch < 1 || options.batch > 4096) {
    return absl::InvalidArgumentError("--batch: expected 1 to 4096");
  }
  if (options.tokens < 0 || options.tokens > 65536) {
    return absl::InvalidArgumentError("--tokens: expected 0 to 65536");
  }
  if (options.max_tokens < 1 || options.max_tokens > 1'000'000) {
    return absl::InvalidArgumentError("--max_tokens: expected 1 to 1000000");
  }
  if (options.requests < 0) return absl::InvalidArgumentError("--requests: expected at least 0");
  if (options.step_token_budget < 1 || options.step_token_budget > 65536) {
    return absl::InvalidArgumentError("--step_token_budget: expected 1 to 65536");
  }
  const absl::string_view benchmark = arguments[1];
  if (benchmark == "decode") return mmfree::BenchDecode(options);
  if (benchmark == "prefill") return mmfree::BenchPrefill(options);
  if (benchmark == "kernels") return mmfree::BenchKernels(options);
  if (benchmark == "load_model") return mmfree::BenchLoad(options);
  if (benchmark == "engine") return mmfree::BenchEngine(options);
  return absl::InvalidArgumentError(absl::StrCat("unknown benchmark \"", benchmark,
                                                 "\": expected decode, prefill, kernels, "
                                                 "load_model or engine"));
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const absl::string_view argument = argv[i];
    if (argument == "--help" || argument == "-h") {
      std::cout << kHelp;
      return 0;
    }
  }
  absl::SetProgramUsageMessage(kHelp);
  const absl::Status status = Run(absl::ParseCommandLine(argc, argv));
  if (status.ok()) return 0;
  std::cerr << "mmfree-bench: " << status.message() << "\n";
  return 1;
}
