#include "server/scheduler/delivery.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/support/collecting_sink.h"

namespace mmfree {
namespace {

TEST(DeliveryTest, EachSinkGetsItsTokensInOrderAndThenItsEnd) {
  for (const int threads : {1, 3}) {
    Delivery delivery(threads);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    std::vector<std::unique_ptr<RequestState>> requests;
    for (int i = 0; i < 50; ++i) {
      sinks.push_back(std::make_shared<CollectingSink>());
      requests.push_back(std::make_unique<RequestState>());
      requests.back()->id = static_cast<uint64_t>(i + 1);
      requests.back()->generation_sink = sinks.back();
    }
    for (int step = 0; step < 100; ++step) {
      for (int i = 0; i < 50; ++i) {
        if (requests[i] == nullptr) continue;
        delivery.AddToken(requests[i].get(), {step * 50 + i, 0.0f});
        // Request i ends in step i.
        if (step == i) delivery.AddEnd(std::move(requests[i]));
      }
      delivery.Publish();
    }
    delivery.WaitForEnds(50);
    for (int i = 0; i < 50; ++i) {
      EXPECT_TRUE(sinks[i]->ended());
      const std::vector<int32_t> ids = sinks[i]->ids();
      ASSERT_EQ(ids.size(), static_cast<size_t>(i + 1));
      for (int step = 0; step <= i; ++step) EXPECT_EQ(ids[step], step * 50 + i);
    }
  }
}

TEST(DeliveryTest, WhatWasPublishedIsDeliveredBeforeItIsDestroyed) {
  auto sink = std::make_shared<CollectingSink>();
  {
    Delivery delivery(1);
    auto request = std::make_unique<RequestState>();
    request->id = 1;
    request->generation_sink = sink;
    request->status = absl::CancelledError("x");
    delivery.AddEnd(std::move(request));
    delivery.Publish();
  }
  ASSERT_TRUE(sink->ended());
  EXPECT_EQ(sink->WaitForEnd().status(), absl::CancelledError("x"));
  EXPECT_EQ(sink.use_count(), 1);  // the request is gone
}

}  // namespace
}  // namespace mmfree
