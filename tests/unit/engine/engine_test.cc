#include "server/engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/collecting_sink.h"
#include "tests/support/fake_backend.h"
#include "tests/support/fake_model.h"
#include "tests/support/metric_reader.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int32_t kVocabSize = 97;

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() {
    options_.model_name = "tales";
    options_.clock = &clock_;
    device_options_.vocab_size = kVocabSize;
    device_options_.clock = &clock_;
    device_options_.step_time = absl::Milliseconds(10);
  }

  absl::StatusOr<std::unique_ptr<Engine>> Create() {
    device_ = std::make_shared<FakeDevice>(device_options_);
    return Engine::Create(options_, std::make_shared<FakeModel>(kVocabSize),
                          std::make_shared<FakeTokenizer>(), FakeDevice::MakeBackend(device_),
                          metrics_.get());
  }
  void Start() {
    auto engine = Create();
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  static GenerationRequest Generation(int prompt, int64_t max_new_tokens) {
    GenerationRequest request;
    request.prompt.assign(prompt, 5);
    request.max_new_tokens = max_new_tokens;
    return request;
  }

  double Metric(const std::string& name, const std::string& key = "",
                const std::string& value = "") const {
    return MetricValue(*registry_, name, key, value);
  }

  FakeClock clock_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(registry_.get());
  Engine::Options options_;
  FakeBackendOptions device_options_;
  std::shared_ptr<FakeDevice> device_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineTest, OptionsOutOfRangeAreRefusedByName) {
  const auto expect_refused = [&](const std::string& name,
                                  const std::function<void(Engine::Options*)>& change) {
    const Engine::Options good = options_;
    change(&options_);
    const absl::Status status = Create().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    options_ = good;
  };
  expect_refused("max_batch", [](auto* o) { o->max_batch = -1; });
  expect_refused("max_queue ", [](auto* o) { o->max_queue = -1; });
  expect_refused("max_queue_tokens", [](auto* o) { o->max_queue_tokens = 0; });
  expect_refused("prefill_chunk", [](auto* o) { o->prefill_chunk = 0; });
  expect_refused("step_token_budget", [](auto* o) { o->step_token_budget = 0; });
  expect_refused("delivery_threads", [](auto* o) { o->delivery_threads = 0; });
}

TEST_F(EngineTest, NamesWhatItServes) {
  Start();
  EXPECT_EQ(engine_->model_name(), "tales");
  EXPECT_EQ(engine_->model().config().vocab_size, kVocabSize);
  EXPECT_EQ(engine_->tokenizer().eos_id(), 2);
  EXPECT_EQ(engine_->backend_info().name, "fake");
  EXPECT_TRUE(engine_->healthy());
  EXPECT_EQ(Metric("mmfree_model_info", "digest", std::string(64, 'f')), 1);
  EXPECT_EQ(Metric("mmfree_state_slots", "model", "tales"), device_options_.num_slots);
}

TEST_F(EngineTest, GeneratesAndScores) {
  Start();
  auto stream = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(Generation(3, 5), stream).ok());
  ASSERT_TRUE(stream->WaitForEnd().ok());
  EXPECT_EQ(stream->ids().size(), 5u);
  ScoreRequest request;
  request.tokens = {1, 2, 3};
  auto score = std::make_shared<CollectingScoreSink>();
  ASSERT_TRUE(engine_->Score(request, score).ok());
  ASSERT_TRUE(score->WaitForEnd().ok());
  EXPECT_EQ(score->WaitForEnd()->logprobs.size(), 2u);
}

TEST_F(EngineTest, AStepNeverHasMoreTokensThanTheBackendTakes) {
  device_options_.max_step_tokens = 10;
  Start();
  auto sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(Generation(500, 5), sink).ok());
  EXPECT_TRUE(sink->WaitForEnd().ok());
  EXPECT_EQ(device_->violations(), std::vector<std::string>());
}

TEST_F(EngineTest, ADrainTellsHealthBeforeItRefuses) {
  std::vector<bool> told;
  options_.health_listener = [&](bool healthy) { told.push_back(healthy); };
  Start();
  auto sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(Generation(3, 50), sink).ok());
  engine_->Drain(absl::InfiniteFuture());
  engine_->Drain(absl::InfinitePast());
  EXPECT_THAT(told, ElementsAre(false));
  EXPECT_FALSE(engine_->healthy());
  EXPECT_TRUE(sink->ended());
  EXPECT_TRUE(sink->WaitForEnd().ok());
  EXPECT_EQ(engine_->Submit(Generation(3, 5), std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(EngineTest, ADeviceFaultMakesItUnhealthyForGood) {
  std::vector<bool> told;
  options_.health_listener = [&](bool healthy) { told.push_back(healthy); };
  Start();
  device_->FailNextStep(absl::InternalError("gone"));
  auto sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine_->Submit(Generation(3, 5), sink).ok());
  EXPECT_EQ(sink->WaitForEnd().status().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(engine_->healthy());
  EXPECT_THAT(told, ElementsAre(false));
  EXPECT_EQ(engine_->Submit(Generation(3, 5), std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine_->load().slots_used, 0);
}

TEST_F(EngineTest, LoadTellsWhatWaitsAndForHowLong) {
  device_options_.num_slots = 2;
  Start();
  // Each request takes three steps of 10 ms, two at a time.
  for (int i = 0; i < 50; ++i) {
    auto a = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine_->Submit(Generation(3, 3), a).ok());
    ASSERT_TRUE(a->WaitForEnd().ok());
  }
  const Engine::Load idle = engine_->load();
  EXPECT_EQ(idle.running, 0);
  EXPECT_EQ(idle.slots_total, 2);
  EXPECT_LE(idle.estimated_wait, absl::Milliseconds(11));

  device_->CloseGate();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 12; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    ASSERT_TRUE(engine_->Submit(Generation(3, 3), sinks.back()).ok());
    if (i == 0) device_->WaitUntilHeldUp();
  }
  device_->ReleaseSteps(1);
  device_->WaitUntilHeldUp();
  const Engine::Load busy = engine_->load();
  EXPECT_EQ(busy.running, 2);
  EXPECT_EQ(busy.slots_used, 2);
  EXPECT_EQ(busy.queued, 10);
  EXPECT_EQ(busy.queued_tokens, 30);
  // Measured one by one, 11 departures of 30 ms each; at least what two at a time would take.
  EXPECT_GE(busy.estimated_wait, absl::Milliseconds(150));
  EXPECT_LE(busy.estimated_wait, absl::Milliseconds(400));
  device_->OpenGate();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->WaitForEnd().ok());
}

TEST_F(EngineTest, AfterAMassAbortEveryGaugeReadsZeroAndEachRequestCountedOnce) {
  device_options_.num_slots = 16;
  options_.max_queue = 50;
  options_.max_stream_backlog = 4;
  Start();
  device_->CloseGate();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  std::vector<RequestHandle> handles;
  int refused = 0;
  for (int i = 0; i < 100; ++i) {
    auto sink = std::make_shared<CollectingSink>(i % 2 == 0 ? CollectingSink::Reader::kIdle
                                                            : CollectingSink::Reader::kEager);
    const auto handle = engine_->Submit(Generation(1 + 40 * (i % 5), 1'000'000), sink);
    if (handle.ok()) {
      sinks.push_back(sink);
      handles.push_back(*handle);
    } else {
      EXPECT_EQ(handle.status().code(), absl::StatusCode::kResourceExhausted);
      ++refused;
    }
  }
  EXPECT_EQ(refused, 100 - 66);
  device_->ReleaseSteps(20);
  device_->WaitUntilHeldUp();
  EXPECT_EQ(Metric("mmfree_num_requests_running"), 16);
  EXPECT_EQ(Metric("mmfree_state_slots_used"), 16);
  // Those that nobody reads have given their slots to others.
  EXPECT_GT(Metric("mmfree_num_requests_paused"), 0);
  EXPECT_LT(Metric("mmfree_num_requests_waiting"), 50);
  EXPECT_GT(Metric("mmfree_tokens_in_flight"), 50'000'000);

  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < handles.size(); i += 4) engine_->Cancel(handles[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  device_->OpenGate();
  for (const auto& sink : sinks) {
    EXPECT_EQ(sink->WaitForEnd().status().code(), absl::StatusCode::kCancelled);
  }
  for (const char* gauge :
       {"mmfree_num_requests_waiting", "mmfree_num_requests_running", "mmfree_num_requests_paused",
        "mmfree_num_requests_preempted", "mmfree_tokens_in_flight", "mmfree_state_slots_used"}) {
    EXPECT_EQ(Metric(gauge), 0) << gauge;
  }
  EXPECT_EQ(Metric("mmfree_requests_total", "outcome", "cancelled"), 66);
  EXPECT_EQ(Metric("mmfree_requests_total", "outcome", "resource_exhausted"), 34);
  EXPECT_EQ(Metric("mmfree_requests_total"), 100);
  EXPECT_EQ(engine_->load().queued_tokens, 0);
}

}  // namespace
}  // namespace mmfree
