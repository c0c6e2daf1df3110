// What the step thread spends outside the backend, per step, with every row decoding:
//   step_loop_bench [step_us]
// The backend computes nothing; it spins for step_us (default 0) to give the delivery thread the
// time it has in service. Sinks only count.
#include <prometheus/registry.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <vector>

#include "absl/time/clock.h"
#include "server/metrics/metrics.h"
#include "server/scheduler/step_loop.h"

namespace mmfree {
namespace {

constexpr int kSteps = 3000;
constexpr int kWarmup = 200;

int64_t Nanos(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// Times between the return of one step and the call of the next, on the step thread.
class TimingBackend final : public Backend {
 public:
  TimingBackend(int32_t slots, int64_t step_nanos, std::vector<int64_t>* wall,
                std::vector<int64_t>* cpu)
      : step_nanos_(step_nanos), wall_(wall), cpu_(cpu) {
    info_.name = "none";
    info_.num_slots = slots;
    info_.max_step_tokens = 1 << 20;
  }
  const BackendInfo& info() const override { return info_; }
  absl::Status Step(absl::Span<const StepRow> rows, StepOutput* out) override {
    const int64_t wall = Nanos(CLOCK_MONOTONIC);
    const int64_t cpu = Nanos(CLOCK_THREAD_CPUTIME_ID);
    if (rows.size() == static_cast<size_t>(info_.num_slots) && last_wall_ > 0) {
      wall_->push_back(wall - last_wall_);
      cpu_->push_back(cpu - last_cpu_);
    }
    out->samples.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) out->samples[i] = {static_cast<int32_t>(i % 7), -1.0f};
    out->scores.clear();
    out->logits.clear();
    while (Nanos(CLOCK_MONOTONIC) < wall + step_nanos_) {
    }
    last_cpu_ = Nanos(CLOCK_THREAD_CPUTIME_ID);
    last_wall_ = Nanos(CLOCK_MONOTONIC);
    return absl::OkStatus();
  }
  absl::Status Rewind(int32_t, int32_t) override { return absl::OkStatus(); }
  absl::Status ZeroSlot(int32_t) override { return absl::OkStatus(); }
  absl::Status CopySlot(int32_t, int32_t) override { return absl::OkStatus(); }
  absl::Status ReadSlot(int32_t, absl::Span<float>) override { return absl::OkStatus(); }
  absl::Status WriteSlot(int32_t, absl::Span<const float>) override { return absl::OkStatus(); }

 private:
  BackendInfo info_;
  const int64_t step_nanos_;
  std::vector<int64_t>* const wall_;
  std::vector<int64_t>* const cpu_;
  int64_t last_wall_ = 0;
  int64_t last_cpu_ = 0;
};

class CountingSink final : public GenerationSink {
 public:
  void OnTokens(absl::Span<const SampledToken> tokens) override {
    tokens_.fetch_add(tokens.size(), std::memory_order_relaxed);
  }
  void OnFinished(const absl::StatusOr<GenerationResult>&) override {}
  size_t backlog() const override { return 0; }

 private:
  std::atomic<size_t> tokens_{0};
};

double Percentile(std::vector<int64_t> nanos, double share) {
  std::sort(nanos.begin(), nanos.end());
  return static_cast<double>(nanos[static_cast<size_t>(share * (nanos.size() - 1))]) / 1000.0;
}

void Run(int32_t rows, int64_t step_nanos) {
  prometheus::Registry registry;
  const std::unique_ptr<Metrics> metrics = Metrics::Create(&registry);
  std::vector<int64_t> wall;
  std::vector<int64_t> cpu;
  wall.reserve(size_t{2} * kSteps);
  cpu.reserve(size_t{2} * kSteps);
  {
    StepLoop::Options options;
    options.policy.max_batch = rows;
    options.policy.step_token_budget = std::max(rows, 1024);
    options.max_stream_backlog = 1 << 20;
    options.vocab_size = 100;
    StepLoop loop(options, std::make_unique<TimingBackend>(rows, step_nanos, &wall, &cpu),
                  metrics->ForModel({"m", "d", "none", ""}));
    for (int32_t i = 0; i < rows; ++i) {
      GenerationRequest request;
      request.prompt = {1};
      request.max_new_tokens = kSteps + kWarmup;
      request.eos_token_ids = {50};
      if (!loop.Submit(request, std::make_shared<CountingSink>()).ok()) abort();
    }
    loop.Drain(absl::InfiniteFuture());
  }
  wall.erase(wall.begin(), wall.begin() + std::min<size_t>(wall.size() / 2, kWarmup));
  cpu.erase(cpu.begin(), cpu.begin() + std::min<size_t>(cpu.size() / 2, kWarmup));
  const double p50 = Percentile(cpu, 0.5);
  printf(
      "%6d rows: CPU p50 %8.2f us (%6.1f ns/row)  p99 %8.2f us   wall p50 %8.2f us  p99 %8.2f us\n",
      rows, p50, 1000.0 * p50 / rows, Percentile(cpu, 0.99), Percentile(wall, 0.5),
      Percentile(wall, 0.99));
}

}  // namespace
}  // namespace mmfree

int main(int argc, char** argv) {
  const int64_t step_nanos = argc > 1 ? 1000 * atoll(argv[1]) : 0;
  for (const int32_t rows : {1, 64, 256, 1000}) mmfree::Run(rows, step_nanos);
  return 0;
}
