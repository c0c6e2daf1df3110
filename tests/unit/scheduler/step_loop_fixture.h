// A step loop over a fake backend, with its clock and metrics in the test's hands.
#ifndef MMFREE_TESTS_UNIT_SCHEDULER_STEP_LOOP_FIXTURE_H_
#define MMFREE_TESTS_UNIT_SCHEDULER_STEP_LOOP_FIXTURE_H_

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>
#include <vector>

#include "server/metrics/metrics.h"
#include "server/scheduler/step_loop.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/fake_backend.h"
#include "tests/support/fake_clock.h"
#include "tests/support/metric_reader.h"

namespace mmfree {

class StepLoopFixture : public ::testing::Test {
 protected:
  StepLoopFixture() {
    options_.policy.prefill_chunk = 8;
    options_.policy.step_token_budget = 64;
    options_.clock = &clock_;
    options_.fault_listener = [this] { faults_.fetch_add(1); };
    device_options_.clock = &clock_;
    device_options_.step_time = absl::Milliseconds(1);
  }

  // Every test, whatever it does: no call that breaks the backend's contract, nothing left behind.
  void TearDown() override {
    if (device_ == nullptr) return;
    device_->OpenGate();
    loop_.reset();
    EXPECT_EQ(device_->violations(), std::vector<std::string>());
    for (const char* gauge : {"mmfree_num_requests_waiting", "mmfree_num_requests_running",
                              "mmfree_num_requests_paused", "mmfree_num_requests_preempted",
                              "mmfree_tokens_in_flight", "mmfree_state_slots_used"}) {
      EXPECT_EQ(Metric(gauge), 0) << gauge;
    }
  }

  // Call once, after changing options_ and device_options_.
  void Start() {
    options_.vocab_size = device_options_.vocab_size;
    device_ = std::make_shared<FakeDevice>(device_options_);
    loop_ = std::make_unique<StepLoop>(options_, FakeDevice::MakeBackend(device_), instruments_);
  }

  std::vector<int32_t> Prompt(int tokens, int salt = 0) const {
    std::vector<int32_t> prompt;
    for (int i = 0; i < tokens; ++i) {
      prompt.push_back((i * 31 + salt * 7 + 1) % device_options_.vocab_size);
    }
    return prompt;
  }

  static GenerationRequest Generation(std::vector<int32_t> prompt, int64_t max_new_tokens) {
    GenerationRequest request;
    request.prompt = std::move(prompt);
    request.max_new_tokens = max_new_tokens;
    return request;
  }

  // Submits and expects it to be taken.
  RequestHandle MustSubmit(GenerationRequest request, std::shared_ptr<GenerationSink> sink) {
    absl::StatusOr<RequestHandle> handle = loop_->Submit(std::move(request), std::move(sink));
    EXPECT_TRUE(handle.ok()) << handle.status();
    return handle.value_or(0);
  }

  std::vector<int32_t> ExpectedIds(const std::vector<int32_t>& prompt, int count,
                                   const SamplingParams& sampling = {}) const {
    std::vector<int32_t> ids;
    for (const SampledToken& token : device_->Expected(prompt, sampling, count)) {
      ids.push_back(token.token);
    }
    return ids;
  }

  double Metric(const std::string& name, const std::string& key = "",
                const std::string& value = "") const {
    return MetricValue(*registry_, name, key, value);
  }
  double Outcomes(const std::string& outcome) const {
    return Metric("mmfree_requests_total", "outcome", outcome);
  }

  FakeClock clock_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(registry_.get());
  ModelMetrics* instruments_ = metrics_->ForModel({"m", "d", "fake", "fake"});
  std::atomic<int> faults_{0};
  StepLoop::Options options_;
  FakeBackendOptions device_options_;
  std::shared_ptr<FakeDevice> device_;
  std::unique_ptr<StepLoop> loop_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_SCHEDULER_STEP_LOOP_FIXTURE_H_
