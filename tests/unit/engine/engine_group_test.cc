#include "server/engine/engine_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/scheduler/retry_after.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/fake_backend.h"
#include "tests/support/fake_model.h"
#include "tests/support/metric_reader.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kVocabSize = 97;
constexpr int32_t kSlots = 2;

GenerationRequest Generation(std::vector<int32_t> prompt, int64_t max_new_tokens) {
  GenerationRequest request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = max_new_tokens;
  return request;
}

class EngineGroupTest : public ::testing::Test {
 protected:
  static constexpr size_t kMembers = 3;

  void SetUp() override {
    std::vector<std::unique_ptr<Engine>> members;
    for (size_t i = 0; i < kMembers; ++i) {
      FakeBackendOptions device;
      device.num_slots = kSlots;
      device.resident_slots = 4;
      device.vocab_size = kVocabSize;
      device.clock = &clock_;
      devices_.push_back(std::make_shared<FakeDevice>(device));
      Engine::Options options;
      options.model_name = "tales";
      options.replica = absl::StrCat(i);
      options.max_queue = 0;
      options.clock = &clock_;
      auto member = Engine::Create(options, std::make_shared<FakeModel>(kVocabSize),
                                   std::make_shared<FakeTokenizer>(),
                                   FakeDevice::MakeBackend(devices_.back()), metrics_.get());
      ASSERT_TRUE(member.ok()) << member.status();
      members.push_back(*std::move(member));
    }
    auto group = GroupEngines(std::move(members));
    ASSERT_TRUE(group.ok()) << group.status();
    group_ = *std::move(group);
  }

  void CloseGates() {
    for (const auto& device : devices_) device->CloseGate();
  }
  void OpenGates() {
    for (const auto& device : devices_) device->OpenGate();
  }

  FakeClock clock_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(registry_.get());
  std::vector<std::shared_ptr<FakeDevice>> devices_;
  std::unique_ptr<Engine> group_;
};

TEST_F(EngineGroupTest, RequestsSpreadOverAllMembersAndFillEverySlotBeforeOneIsRefused) {
  CloseGates();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (size_t i = 0; i < kMembers * kSlots; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    const auto handle = group_->Submit(Generation({5, 6}, 4), sinks.back());
    ASSERT_TRUE(handle.ok()) << i << ": " << handle.status();
    const Engine::Load load = group_->load();
    EXPECT_EQ(load.running + load.queued, static_cast<int32_t>(i) + 1);
    EXPECT_EQ(load.slots_total, static_cast<int32_t>(kMembers) * kSlots);
  }
  const auto refused = group_->Submit(Generation({5}, 4), std::make_shared<CollectingSink>());
  absl::Status refusal = refused.status();
  EXPECT_EQ(refusal.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(TakeRetryAfter(&refusal), group_->load().estimated_wait);
  EXPECT_EQ(group_->load().tokens_in_flight, static_cast<int64_t>(kMembers) * kSlots * (2 + 4));
  EXPECT_EQ(group_->limits().requests, static_cast<int64_t>(kMembers) * kSlots);
  OpenGates();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->WaitForEnd().ok());
  for (const auto& device : devices_) {
    EXPECT_GE(device->num_steps(), 4);
    EXPECT_TRUE(device->violations().empty());
  }
}

TEST_F(EngineGroupTest, ACancelReachesTheMemberThatRunsTheRequestAndNoOther) {
  CloseGates();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  std::vector<RequestHandle> handles;
  for (size_t i = 0; i < kMembers * kSlots; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    handles.push_back(*group_->Submit(Generation({5}, 6), sinks.back()));
    EXPECT_NE(handles.back(), 0u);
  }
  group_->Cancel(handles[4]);
  OpenGates();
  for (size_t i = 0; i < sinks.size(); ++i) {
    const auto& result = sinks[i]->WaitForEnd();
    EXPECT_EQ(result.status().code(),
              i == 4 ? absl::StatusCode::kCancelled : absl::StatusCode::kOk);
  }
}

TEST_F(EngineGroupTest, AMemberWhoseDeviceFailedGetsNoMoreRequestsAndTheOthersServe) {
  devices_[0]->FailNextStep(absl::InternalError("gone"));
  const auto first = std::make_shared<CollectingSink>();
  ASSERT_TRUE(group_->Submit(Generation({5}, 3), first).ok());
  EXPECT_EQ(first->WaitForEnd().status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(group_->healthy());
  const int64_t steps = devices_[0]->num_steps();
  for (int i = 0; i < 8; ++i) {
    const auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(group_->Submit(Generation({7}, 3), sink).ok());
    EXPECT_TRUE(sink->WaitForEnd().ok());
  }
  EXPECT_EQ(devices_[0]->num_steps(), steps);
  for (size_t i = 1; i < kMembers; ++i) {
    devices_[i]->FailNextStep(absl::InternalError("gone"));
    const auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(group_->Submit(Generation({5}, 3), sink).ok());
    EXPECT_FALSE(sink->WaitForEnd().ok());
  }
  EXPECT_FALSE(group_->healthy());
  EXPECT_EQ(group_->Submit(Generation({5}, 3), std::make_shared<CollectingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(EngineGroupTest, ADrainEndsWhenEveryMemberIsEmptyAndEachReportsForItself) {
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (size_t i = 0; i < kMembers; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    ASSERT_TRUE(group_->Submit(Generation({5}, 50), sinks.back()).ok());
  }
  group_->Drain(absl::InfiniteFuture());
  for (const auto& sink : sinks) EXPECT_TRUE(sink->ended());
  double ended = 0;
  for (size_t i = 0; i < kMembers; ++i) {
    const std::string replica = absl::StrCat(i);
    EXPECT_EQ(MetricValue(*registry_, "mmfree_state_slots", "replica", replica), kSlots);
    EXPECT_EQ(MetricValue(*registry_, "mmfree_num_requests_running", "replica", replica), 0);
    ended += MetricValue(*registry_, "mmfree_generation_tokens_total", "replica", replica);
  }
  EXPECT_EQ(ended, kMembers * 50.0);
}

// A request goes to the member that has its state, busier than others as it may be, unless none of
// its slots is free; and goes on from that state wherever it is.
TEST_F(EngineGroupTest, ARequestGoesToTheMemberThatHasItsState) {
  GenerationRequest first = Generation({5, 6, 7}, 3);
  first.final_state = std::make_shared<FinalState>();
  first.final_on_device = true;
  const std::shared_ptr<FinalState> left = first.final_state;
  const auto first_sink = std::make_shared<CollectingSink>();
  ASSERT_TRUE(group_->Submit(std::move(first), first_sink).ok());
  ASSERT_TRUE(first_sink->WaitForEnd().ok());
  ASSERT_NE(left->device, nullptr);
  const auto pools = group_->device_pools();
  ASSERT_EQ(pools.size(), kMembers);
  size_t home = 0;
  while (pools[home].get() != left->device->pool()) ASSERT_LT(++home, kMembers);

  std::vector<int32_t> context = {5, 6, 7};
  for (const int32_t id : first_sink->ids()) context.push_back(id);
  const auto go_on = [&] {
    GenerationRequest next = Generation(left->pending, 3);
    next.device_state = left->device;
    next.first_position = static_cast<uint64_t>(left->fed);
    auto sink = std::make_shared<CollectingSink>();
    EXPECT_TRUE(group_->Submit(std::move(next), sink).ok());
    return sink;
  };
  CloseGates();
  std::vector<int64_t> before;
  for (const auto& device : devices_) before.push_back(device->num_steps());
  // Both of its slots, while the others have nothing to do; then those.
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < kSlots; ++i) sinks.push_back(go_on());
  EXPECT_EQ(group_->load().running + group_->load().queued, kSlots);
  OpenGates();
  for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitForEnd().ok());
  for (size_t i = 0; i < kMembers; ++i) {
    EXPECT_EQ(devices_[i]->num_steps() > before[i], i == home) << i;
  }
  CloseGates();
  for (int i = 0; i < kSlots + 1; ++i) sinks.push_back(go_on());
  OpenGates();
  int elsewhere = 0;
  for (const auto& sink : sinks) ASSERT_TRUE(sink->WaitForEnd().ok());
  for (size_t i = 0; i < kMembers; ++i) {
    if (i != home && devices_[i]->num_steps() > before[i]) ++elsewhere;
    EXPECT_TRUE(devices_[i]->violations().empty());
  }
  EXPECT_EQ(elsewhere, 1);
  std::vector<int32_t> expected;
  for (const SampledToken& token : devices_[0]->Expected(context, SamplingParams(), 3)) {
    expected.push_back(token.token);
  }
  for (const auto& sink : sinks) EXPECT_EQ(sink->ids(), expected);
}

TEST(GroupEnginesTest, NoMembersAreRefused) {
  EXPECT_EQ(GroupEngines({}).status().code(), absl::StatusCode::kInvalidArgument);
}

// Real backends of different instruction sets and thread counts behind one group: whichever member
// a request lands on, it gets the bytes of a lone engine.
TEST(GroupEnginesTest, EveryMemberGivesTheSameTokensOnRealBackends) {
  ModelConfig config = *ConfigForShape("tales");
  config.num_layers = 2;
  config.vocab_size = 300;
  const std::shared_ptr<const Model> model = Model::Random(config, 3);
  prometheus::Registry registry;
  const std::unique_ptr<Metrics> metrics = Metrics::Create(&registry);
  const auto make = [&](const std::string& isa, int threads, const std::string& replica) {
    CpuBackendOptions cpu;
    cpu.isa = isa;
    cpu.threads = threads;
    cpu.num_slots = 4;
    Engine::Options options;
    options.model_name = "random";
    options.replica = replica;
    return *Engine::Create(options, model, std::make_shared<FakeTokenizer>(),
                           *CreateCpuBackend(model, cpu), metrics.get());
  };
  const auto run = [](Engine& engine, uint64_t seed) {
    GenerationRequest request = Generation({1, static_cast<int32_t>(seed), 17}, 24);
    request.sampling.temperature = 0.9f;
    request.sampling.seed = seed;
    auto sink = std::make_shared<CollectingSink>();
    EXPECT_TRUE(engine.Submit(std::move(request), sink).ok());
    return sink;
  };
  std::vector<std::unique_ptr<Engine>> members;
  members.push_back(make("scalar", 1, "0"));
  members.push_back(make("auto", 1, "1"));
  members.push_back(make("auto", 2, "2"));
  const std::unique_ptr<Engine> group = *GroupEngines(std::move(members));
  EXPECT_THAT(group->backend_info().description, HasSubstr("3 x "));
  const std::unique_ptr<Engine> alone = make("scalar", 1, "alone");
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (uint64_t seed = 0; seed < 12; ++seed) sinks.push_back(run(*group, seed));
  for (uint64_t seed = 0; seed < 12; ++seed) {
    ASSERT_TRUE(sinks[seed]->WaitForEnd().ok());
    const auto expected = run(*alone, seed);
    ASSERT_TRUE(expected->WaitForEnd().ok());
    EXPECT_EQ(sinks[seed]->ids(), expected->ids()) << seed;
  }
}

}  // namespace
}  // namespace mmfree
