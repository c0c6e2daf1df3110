// Times whole steps of the CUDA backend over random weights and prints them against the floors of
// the device: bytes of weights over memory bandwidth, operations over the int8 rate.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/types/span.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/sampler_rows.h"

ABSL_FLAG(std::vector<std::string>, shapes, (std::vector<std::string>{"370m", "1.3b", "2.7b"}),
          "Named shapes");
ABSL_FLAG(std::vector<std::string>, decode,
          (std::vector<std::string>{"1", "2", "4", "8", "16", "32", "64", "128", "256", "512",
                                    "1024"}),
          "Batch sizes to decode");
ABSL_FLAG(std::vector<std::string>, prefill, (std::vector<std::string>{"512", "2048", "16384"}),
          "Prompt lengths to feed in chunks of --chunk");
ABSL_FLAG(std::vector<std::string>, mixed, (std::vector<std::string>{}),
          "Steps that decode and feed prompts, each as DECODING_ROWS+PROMPTSxTOKENS: 256+2x32");
ABSL_FLAG(std::vector<std::string>, options, (std::vector<std::string>{"none"}),
          "What the decoding rows ask of sampling, all of them: see sampler_rows.h; shares are of "
          "the step of the first, none");
ABSL_FLAG(bool, on_trial, false,
          "The prompts of --mixed are sampled at each token and taken back to the first one");
ABSL_FLAG(int32_t, chunk, 2048, "Tokens a step");
ABSL_FLAG(double, warmup, 0.15, "Seconds before each measurement: clocks rise with load");
ABSL_FLAG(double, seconds, 0.15, "Seconds of each measurement; the median step counts");
ABSL_FLAG(std::string, kernels, "auto", "auto, generic, wide, decode, persistent or cluster");
ABSL_FLAG(bool, graphs, true, "Replay decode steps as CUDA graphs");
ABSL_FLAG(double, read_tb_s, 4.40, "Measured read bandwidth of the device, TB/s");

namespace mmfree {
namespace {

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::micro>(Clock::now() - since).count();
}

double Seconds(Clock::time_point since) { return Microseconds(since) * 1e-6; }

double Total() { return absl::GetFlag(FLAGS_warmup) + absl::GetFlag(FLAGS_seconds); }

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<int32_t> Numbers(const std::vector<std::string>& texts) {
  std::vector<int32_t> numbers;
  for (const std::string& text : texts) {
    int32_t number = 0;
    if (absl::SimpleAtoi(text, &number) && number > 0) numbers.push_back(number);
  }
  return numbers;
}

void Check(const absl::Status& status) {
  if (status.ok()) return;
  fprintf(stderr, "%s\n", status.ToString().c_str());
  exit(1);
}

void Run(Backend& backend, absl::Span<const StepRow> rows, StepOutput* out) {
  Check(backend.Step(rows, out));
}

// Returns the step's microseconds.
double BenchDecode(Backend& backend, const Model& model, int32_t batch, const std::string& option,
                   double without) {
  const std::unique_ptr<SamplerRows> samplers =
      SamplerRows::Create(option, model.config().vocab_size, batch);
  if (samplers == nullptr) {
    fprintf(stderr, "--options: \"%s\" is not known\n", option.c_str());
    exit(2);
  }
  std::vector<int32_t> tokens(batch);
  for (int32_t n = 0; n < batch; ++n) tokens[n] = (n * 977 + 5) % model.config().vocab_size;
  std::vector<SamplingParams> sampling(batch);
  for (int32_t n = 0; n < batch; ++n) {
    sampling[n].sampler = samplers->sampler(n);
    sampling[n].seed = static_cast<uint64_t>(n);
    if (option != "none") sampling[n].temperature = 0.8f;
  }
  std::vector<StepRow> rows(batch);
  StepOutput out;
  std::vector<double> times;
  std::vector<double> between;  // telling the samplers what was sampled
  const Clock::time_point begin = Clock::now();
  for (uint64_t step = 0; Seconds(begin) < Total() || times.empty(); ++step) {
    for (int32_t n = 0; n < batch; ++n) {
      rows[n].slot = n;
      rows[n].tokens = absl::MakeConstSpan(&tokens[n], 1);
      rows[n].position = step;
      rows[n].sampling = &sampling[n];
    }
    const Clock::time_point start = Clock::now();
    Run(backend, rows, &out);
    if (Seconds(begin) >= absl::GetFlag(FLAGS_warmup)) times.push_back(Microseconds(start));
    const Clock::time_point sampled = Clock::now();
    for (int32_t n = 0; n < batch; ++n) {
      tokens[n] = out.samples[n].token;
      samplers->Append(n, tokens[n]);
    }
    between.push_back(Microseconds(sampled));
  }
  const double us = Median(times);
  if (option != "none") {
    printf("decode  B=%-5d %9.1f us  with %s: %+.1f us, %.1f %%; %.1f us between steps\n", batch,
           us, option.c_str(), us - without, (us - without) / without * 100.0, Median(between));
    return us;
  }
  const double weights = static_cast<double>(model.ternary_bytes());
  // Four weights a byte, a multiply and an add each.
  const double tops = weights * 8.0 * batch / us * 1e-6;
  printf(
      "decode  B=%-5d %9.1f us  %9.0f tok/s  weights %6.0f GB/s (%4.1f %% of read)  %6.1f TOPS\n",
      batch, us, batch / us * 1e6, weights / us * 1e-3,
      weights / us * 1e-6 / absl::GetFlag(FLAGS_read_tb_s) * 100.0, tops);
  return us;
}

struct MixedStep {
  int32_t decoding = 0;
  int32_t prompts = 0;
  int32_t prompt_tokens = 0;

  int32_t rows() const { return decoding + prompts; }
  int32_t tokens() const { return decoding + prompts * prompt_tokens; }
};

std::vector<MixedStep> MixedSteps(const std::vector<std::string>& texts) {
  std::vector<MixedStep> steps;
  for (const std::string& text : texts) {
    MixedStep step;
    if (sscanf(text.c_str(), "%d+%dx%d", &step.decoding, &step.prompts, &step.prompt_tokens) != 3 ||
        step.decoding < 0 || step.prompts < 1 || step.prompt_tokens < 1) {
      fprintf(stderr, "--mixed: \"%s\" is not DECODING_ROWS+PROMPTSxTOKENS\n", text.c_str());
      exit(2);
    }
    steps.push_back(step);
  }
  return steps;
}

void BenchMixed(Backend& backend, const Model& model, const MixedStep& mixed) {
  std::vector<int32_t> tokens(mixed.tokens());
  for (size_t n = 0; n < tokens.size(); ++n) {
    tokens[n] = static_cast<int32_t>((n * 977 + 5) % model.config().vocab_size);
  }
  const SamplingParams greedy;
  const bool on_trial = absl::GetFlag(FLAGS_on_trial);
  const std::vector<SamplingParams> inner(mixed.prompt_tokens - 1);
  std::vector<StepRow> rows(mixed.rows());
  size_t first = 0;
  for (int32_t n = 0; n < mixed.rows(); ++n) {
    const size_t count = n < mixed.decoding ? 1 : mixed.prompt_tokens;
    rows[n].slot = n;
    rows[n].tokens = absl::MakeConstSpan(tokens).subspan(first, count);
    rows[n].sampling = &greedy;
    rows[n].rewindable = on_trial && count > 1;
    if (rows[n].rewindable) rows[n].inner = inner;
    first += count;
  }
  StepOutput out;
  std::vector<double> times;
  const Clock::time_point begin = Clock::now();
  while (Seconds(begin) < Total() || times.empty()) {
    const Clock::time_point start = Clock::now();
    Run(backend, rows, &out);
    for (const StepRow& row : rows) {
      if (row.rewindable) Check(backend.Rewind(row.slot, 1));
    }
    if (Seconds(begin) >= absl::GetFlag(FLAGS_warmup)) times.push_back(Microseconds(start));
  }
  const double us = Median(times);
  printf("mixed   %d+%dx%d %9.1f us  %9.0f tok/s\n", mixed.decoding, mixed.prompts,
         mixed.prompt_tokens, us, mixed.tokens() / us * 1e6);
}

void BenchPrefill(Backend& backend, const Model& model, int32_t length) {
  const int32_t chunk = absl::GetFlag(FLAGS_chunk);
  std::vector<int32_t> tokens(length);
  for (int32_t n = 0; n < length; ++n) tokens[n] = (n * 977 + 5) % model.config().vocab_size;
  const SamplingParams greedy;
  StepOutput out;
  std::vector<double> times;
  const Clock::time_point begin = Clock::now();
  while (Seconds(begin) < Total() || times.empty()) {
    const Clock::time_point start = Clock::now();
    for (int32_t first = 0; first < length; first += chunk) {
      StepRow row;
      row.tokens = absl::MakeConstSpan(tokens).subspan(first, chunk);
      row.position = first;
      if (first + chunk >= length) row.sampling = &greedy;
      Run(backend, {row}, &out);
    }
    if (Seconds(begin) >= absl::GetFlag(FLAGS_warmup)) times.push_back(Microseconds(start));
  }
  const double us = Median(times);
  const double head = static_cast<double>(model.lm_head().bytes());
  const double tops =
      (static_cast<double>(model.ternary_bytes()) - head) * 8.0 * length / us * 1e-6;
  printf("prefill T=%-5d %9.3f ms  %9.0f tok/s  %7.1f TOPS\n", length, us * 1e-3, length / us * 1e6,
         tops);
}

CudaBackendOptions::Kernels KernelsOf(const std::string& name) {
  if (name == "generic") return CudaBackendOptions::Kernels::kGeneric;
  if (name == "wide") return CudaBackendOptions::Kernels::kWide;
  if (name == "decode") return CudaBackendOptions::Kernels::kDecode;
  if (name == "persistent") return CudaBackendOptions::Kernels::kPersistent;
  if (name == "cluster") return CudaBackendOptions::Kernels::kCluster;
  return CudaBackendOptions::Kernels::kAuto;
}

int Main() {
  const std::vector<int32_t> batches = Numbers(absl::GetFlag(FLAGS_decode));
  const std::vector<MixedStep> mixed_steps = MixedSteps(absl::GetFlag(FLAGS_mixed));
  for (const std::string& shape : absl::GetFlag(FLAGS_shapes)) {
    const absl::StatusOr<ModelConfig> config = ConfigForShape(shape);
    if (!config.ok()) {
      fprintf(stderr, "%s\n", config.status().ToString().c_str());
      return 1;
    }
    const std::shared_ptr<const Model> model = Model::Random(*config, 1);
    CudaBackendOptions options;
    options.num_slots = 1;
    for (const int32_t batch : batches) options.num_slots = std::max(options.num_slots, batch);
    options.max_step_tokens = std::max(options.num_slots, absl::GetFlag(FLAGS_chunk));
    for (const MixedStep& mixed : mixed_steps) {
      options.num_slots = std::max(options.num_slots, mixed.rows());
      options.max_step_tokens = std::max(options.max_step_tokens, mixed.tokens());
    }
    options.kernels = KernelsOf(absl::GetFlag(FLAGS_kernels));
    options.use_graphs = absl::GetFlag(FLAGS_graphs);
    const Clock::time_point start = Clock::now();
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(*model, options);
    if (!backend.ok()) {
      fprintf(stderr, "%s\n", backend.status().ToString().c_str());
      return 1;
    }
    const BackendInfo& info = (*backend)->info();
    printf("%s  (%s)  load %.2f s, weights %.3f GB, states %.3f GB\n", shape.c_str(),
           info.description.c_str(), Microseconds(start) * 1e-6,
           static_cast<double>(info.weight_bytes) * 1e-9,
           static_cast<double>(info.state_bytes) * 1e-9);
    for (const int32_t batch : batches) {
      double without = 0;
      for (const std::string& option : absl::GetFlag(FLAGS_options)) {
        const double us = BenchDecode(**backend, *model, batch, option, without);
        if (option == "none") without = us;
      }
    }
    for (const MixedStep& mixed : mixed_steps) BenchMixed(**backend, *model, mixed);
    for (const int32_t length : Numbers(absl::GetFlag(FLAGS_prefill))) {
      BenchPrefill(**backend, *model, length);
    }
    fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace mmfree

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  return mmfree::Main();
}
