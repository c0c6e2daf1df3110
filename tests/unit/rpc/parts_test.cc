// The small parts of the RPC layer.
#include <atomic>
#include <string>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc/call_gate.h"
#include "server/rpc/conversion.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/worker_pool.h"
#include "tests/support/status_is.h"
#include "tests/unit/rpc/fake_engine.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::HasSubstr;

TEST(ModelRegistry, EmptyNameMeansTheOnlyModel) {
  FakeEngine a("a");
  FakeEngine b("b");
  ModelRegistry registry;
  EXPECT_THAT(registry.Find(""), StatusIs(absl::StatusCode::kInvalidArgument, _));
  ASSERT_THAT(registry.Add(&b), IsOk());
  EXPECT_EQ(registry.Find("").value(), &b);
  ASSERT_THAT(registry.Add(&a), IsOk());
  EXPECT_THAT(registry.Find(""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model: required")));
  EXPECT_EQ(registry.Find("a").value(), &a);
  EXPECT_THAT(registry.Find("c"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("a, b")));
  EXPECT_EQ(registry.engines(), (std::vector<Engine*>{&a, &b}));
}

TEST(ModelRegistry, RefusesBadAndTakenNames) {
  ModelRegistry registry;
  for (const char* name : {"", "a b", "a/b", "a\n", "\xc3\xa9"}) {
    FakeEngine engine(name);
    EXPECT_THAT(registry.Add(&engine), StatusIs(absl::StatusCode::kInvalidArgument, _)) << name;
  }
  FakeEngine one("2.7b_x-Y");
  FakeEngine two("2.7b_x-Y");
  EXPECT_THAT(registry.Add(&one), IsOk());
  EXPECT_THAT(registry.Add(&two), StatusIs(absl::StatusCode::kAlreadyExists, _));
}

TEST(CallGate, ClosedGateRefusesAndStillCounts) {
  CallGate gate;
  EXPECT_TRUE(gate.AwaitEmpty(absl::InfinitePast()));
  EXPECT_THAT(gate.Enter(), IsOk());
  EXPECT_FALSE(gate.AwaitEmpty(absl::InfinitePast()));
  gate.Close();
  EXPECT_TRUE(gate.closed());
  EXPECT_THAT(gate.Enter(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("draining")));
  gate.Leave();
  EXPECT_FALSE(gate.AwaitEmpty(absl::InfinitePast()));
  gate.Leave();
  EXPECT_TRUE(gate.AwaitEmpty(absl::InfiniteFuture()));
}

TEST(WorkerPool, RefusesWhatDoesNotFitAndRunsWhatItTook) {
  std::atomic<int> ran{0};
  {
    absl::Notification running;
    absl::Notification release;
    WorkerPool pool(1, 2);
    ASSERT_TRUE(pool.Schedule([&] {
      running.Notify();
      release.WaitForNotification();
      ++ran;
    }));
    running.WaitForNotification();
    EXPECT_TRUE(pool.Schedule([&] { ++ran; }));
    EXPECT_TRUE(pool.Schedule([&] { ++ran; }));
    EXPECT_FALSE(pool.Schedule([&] { ++ran; }));
    release.Notify();
  }
  EXPECT_EQ(ran, 3);
}

TEST(ListenAddress, ParsesHostsAndPorts) {
  EXPECT_EQ(ParseListenAddress("0.0.0.0:50051")->host, "0.0.0.0");
  EXPECT_EQ(ParseListenAddress("0.0.0.0:50051")->port, 50051);
  EXPECT_EQ(ParseListenAddress("[::]:0")->host, "::");
  EXPECT_EQ(ParseListenAddress("localhost:0")->port, 0);
  EXPECT_THAT(ProbeListenAddress({"no-such-host.invalid", 0}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no-such-host.invalid")));
}

TEST(Conversion, DurationsKeepTheirRangeAndSign) {
  google::protobuf::Duration out;
  ToProto(absl::Nanoseconds(1'500'000'001), &out);
  EXPECT_EQ(out.seconds(), 1);
  EXPECT_EQ(out.nanos(), 500'000'001);
  ToProto(-absl::Milliseconds(1500), &out);
  EXPECT_EQ(out.seconds(), -1);
  EXPECT_EQ(out.nanos(), -500'000'000);
  ToProto(absl::InfiniteDuration(), &out);
  EXPECT_EQ(out.seconds(), 315'576'000'000);
  EXPECT_EQ(out.nanos(), 0);
}

TEST(Conversion, RequestIdsAreKeptOrMade) {
  EXPECT_EQ(RequestIdOr("mine"), "mine");
  const std::string made = RequestIdOr("");
  EXPECT_EQ(made.size(), 16u);
  EXPECT_NE(RequestIdOr(""), made);
}

}  // namespace
}  // namespace mmfree
