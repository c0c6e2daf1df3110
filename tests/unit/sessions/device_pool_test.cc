#include "server/sessions/device_pool.h"

#include <prometheus/registry.h>

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/metric_reader.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

class DevicePoolTest : public testing::Test {
 protected:
  // Slots 10, 11, ...; the state in a slot is its number, twice.
  std::shared_ptr<DevicePool> MakePool(int32_t slots) {
    DevicePool::Options options;
    options.first_slot = 10;
    options.num_slots = slots;
    options.state_floats = 2;
    options.read = [this](int32_t slot, absl::Span<float> state) {
      state[0] = state[1] = static_cast<float>(slot);
      return read_status_;
    };
    return std::make_shared<DevicePool>(std::move(options), metrics_.get());
  }
  static SessionState ContextAt(std::shared_ptr<const DevicePlace> place, int64_t tokens) {
    SessionState context;
    context.state = {1, 2};
    context.device = std::move(place);
    context.token_count = tokens;
    return context;
  }
  double Metric(const std::string& name) const { return MetricValue(registry_, name); }
  double Evictions() const {
    return MetricValue(registry_, "mmfree_session_evictions_total", "tier", "device");
  }

  absl::Status read_status_;
  prometheus::Registry registry_;
  std::unique_ptr<SessionMetrics> metrics_ = SessionMetrics::Create(&registry_);
};

TEST_F(DevicePoolTest, EveryPlaceIsOfOneHolder) {
  const auto pool = MakePool(3);
  std::set<int32_t> slots;
  std::vector<std::shared_ptr<const DevicePlace>> places;
  for (int i = 0; i < 3; ++i) {
    places.push_back(pool->Take());
    ASSERT_NE(places.back(), nullptr);
    EXPECT_EQ(places.back()->pool(), pool.get());
    slots.insert(places.back()->slot());
  }
  EXPECT_EQ(slots, (std::set<int32_t>{10, 11, 12}));
  EXPECT_EQ(pool->Take(), nullptr);
  places.erase(places.begin());
  EXPECT_NE(pool->Take(), nullptr);
}

TEST_F(DevicePoolTest, LeastRecentlyUsedContextsMakeRoom) {
  const auto pool = MakePool(2);
  pool->Put(1, ContextAt(pool->Take(), 100));
  pool->Put(2, ContextAt(pool->Take(), 200));
  EXPECT_EQ(Metric("mmfree_session_device_states"), 2);
  EXPECT_EQ(Metric("mmfree_session_device_bytes"), 16);
  EXPECT_NE(pool->Get(1), nullptr);
  pool->Put(3, ContextAt(pool->Take(), 300));
  EXPECT_FALSE(pool->Contains(2));
  EXPECT_EQ(Evictions(), 1);
  const auto first = pool->Get(1);
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(first->token_count, 100);
  EXPECT_TRUE(first->state.empty());
  std::vector<float> state;
  ASSERT_THAT(first->device->Read(&state), IsOk());
  EXPECT_EQ(state, std::vector<float>(2, static_cast<float>(first->device->slot())));
}

TEST_F(DevicePoolTest, WhatATurnGoesOnFromIsNotGivenToAnother) {
  const auto pool = MakePool(2);
  pool->Put(1, ContextAt(pool->Take(), 100));
  pool->Put(2, ContextAt(pool->Take(), 200));
  const auto held = pool->Get(1);
  const auto place = pool->Take();
  ASSERT_NE(place, nullptr);
  EXPECT_NE(place->slot(), held->device->slot());
  // Everything is in use now: by the new holder, and by who goes on from 1.
  EXPECT_EQ(pool->Take(), nullptr);
  EXPECT_EQ(pool->Get(1), nullptr);
  EXPECT_EQ(Metric("mmfree_session_device_states"), 0);
}

TEST_F(DevicePoolTest, WhatIsErasedOrReplacedIsFree) {
  const auto pool = MakePool(2);
  pool->Put(1, ContextAt(pool->Take(), 1));
  pool->Put(1, ContextAt(pool->Take(), 2));
  EXPECT_EQ(pool->Get(1)->token_count, 2);
  pool->Erase(1);
  pool->Erase(7);
  const auto a = pool->Take();
  const auto b = pool->Take();
  EXPECT_NE(a, nullptr);
  EXPECT_NE(b, nullptr);
  EXPECT_EQ(Evictions(), 0);
  EXPECT_EQ(Metric("mmfree_session_device_bytes"), 0);
}

TEST_F(DevicePoolTest, AClosedPoolHasAndTakesNothing) {
  auto pool = MakePool(2);
  auto place = pool->Take();
  pool->Put(1, ContextAt(pool->Take(), 1));
  pool->Close();
  EXPECT_EQ(pool->Get(1), nullptr);
  EXPECT_EQ(pool->Take(), nullptr);
  pool->Put(2, ContextAt(place, 2));
  EXPECT_FALSE(pool->Contains(2));
  EXPECT_EQ(Metric("mmfree_session_device_states"), 0);
  // A place may outlive its pool.
  pool.reset();
  place.reset();
}

TEST_F(DevicePoolTest, AFailedReadSaysSo) {
  const auto pool = MakePool(1);
  read_status_ = absl::InternalError("bus");
  std::vector<float> state;
  EXPECT_THAT(pool->Take()->Read(&state),
              StatusIs(absl::StatusCode::kInternal, testing::HasSubstr("bus")));
}

}  // namespace
}  // namespace mmfree
