// The parts of mmfree-load that need no server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <vector>

#include "client/load/histogram.h"
#include "client/load/report.h"
#include "client/load/session_maker.h"
#include "client/load/workload.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

TEST(HistogramTest, QuantilesAreWithinAHundredthOfTheExactOnes) {
  std::mt19937_64 random(3);
  std::lognormal_distribution<double> values(3, 2);
  Histogram histogram;
  std::vector<double> exact;
  for (int i = 0; i < 20000; ++i) {
    const double ms = values(random);
    exact.push_back(ms);
    histogram.Add(absl::Milliseconds(ms));
  }
  std::sort(exact.begin(), exact.end());
  for (const double quantile : {0.01, 0.5, 0.9, 0.99, 1.0}) {
    const double expected = exact[static_cast<size_t>(quantile * 20000) - 1];
    const double found = absl::ToDoubleMilliseconds(histogram.Quantile(quantile));
    EXPECT_NEAR(found / expected, 1, 0.0101) << quantile;
  }
  EXPECT_EQ(histogram.count(), 20000);
}

TEST(HistogramTest, WhatIsOutOfRangeIsCounted) {
  Histogram histogram;
  EXPECT_EQ(histogram.Quantile(0.5), absl::ZeroDuration());
  histogram.Add(absl::ZeroDuration());
  histogram.Add(-absl::Seconds(1));
  histogram.Add(absl::Hours(100), 2);
  EXPECT_EQ(histogram.count(), 4);
  EXPECT_LE(histogram.Quantile(0.5), absl::Microseconds(1));
  EXPECT_EQ(histogram.max(), absl::Hours(100));
}

TEST(DistributionTest, DrawsWhatItSays) {
  std::mt19937_64 random(1);
  EXPECT_EQ(Distribution::Parse("7")->Draw(random), 7);
  int64_t low = 1000, high = 0;
  double sum = 0;
  for (int i = 0; i < 10000; ++i) {
    const int64_t uniform = Distribution::Parse("3-9")->Draw(random);
    low = std::min(low, uniform);
    high = std::max(high, uniform);
    const int64_t exponential = Distribution::Parse("exp:50")->Draw(random);
    ASSERT_GE(exponential, 1);
    sum += static_cast<double>(exponential);
  }
  EXPECT_EQ(low, 3);
  EXPECT_EQ(high, 9);
  EXPECT_NEAR(sum / 10000, 50, 2);
}

TEST(DistributionTest, RefusesWhatItCannotRead) {
  for (const char* text :
       {"", "0", "-3", "5-2", "a", "3-", "exp:", "exp:0", "3-9-12", "2000000000"}) {
    EXPECT_FALSE(Distribution::Parse(text).ok()) << text;
  }
}

TEST(WorkloadTest, ARequestIsAFunctionOfSeedAndIndex) {
  WorkloadOptions options;
  options.vocab_size = 100;
  options.prompt_tokens = *Distribution::Parse("1-50");
  options.max_tokens = *Distribution::Parse("exp:20");
  options.cancel = 0.5;
  const auto bytes = [&options](int64_t index) {
    return PlanRequest(options, index).request.SerializeAsString();
  };
  EXPECT_EQ(bytes(5), bytes(5));
  EXPECT_NE(bytes(5), bytes(6));
  const std::string first = bytes(5);
  options.seed = 2;
  EXPECT_NE(bytes(5), first);
}

TEST(WorkloadTest, PromptsStartWithTheSharedPrefix) {
  WorkloadOptions options;
  options.vocab_size = 1000;
  options.prompt_tokens = *Distribution::Parse("20");
  options.shared_prefix = 30;
  const auto ids = [&options](int64_t index) {
    const v1::TokenIds ids = PlanRequest(options, index).request.token_ids();
    return std::vector<int32_t>(ids.ids().begin(), ids.ids().end());
  };
  const std::vector<int32_t> a = ids(1), b = ids(2);
  ASSERT_EQ(a.size(), 50u);
  ASSERT_EQ(b.size(), 50u);
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 30, b.begin()));
  EXPECT_FALSE(std::equal(a.begin() + 30, a.end(), b.begin() + 30));
  options.seed = 2;
  EXPECT_FALSE(std::equal(a.begin(), a.begin() + 30, ids(1).begin()));
}

TEST(WorkloadTest, SharesAreKept) {
  WorkloadOptions options;
  options.vocab_size = 100;
  options.max_tokens = *Distribution::Parse("10");
  options.high = 0.2;
  options.low = 0.3;
  options.cancel = 0.1;
  options.slow = 0.4;
  int high = 0, low = 0, cancelled = 0, slow = 0;
  for (int i = 0; i < 10000; ++i) {
    const PlannedRequest planned = PlanRequest(options, i);
    high += planned.request.priority() == v1::PRIORITY_HIGH ? 1 : 0;
    low += planned.request.priority() == v1::PRIORITY_LOW ? 1 : 0;
    cancelled += planned.cancel_after > 0 ? 1 : 0;
    slow += planned.slow ? 1 : 0;
    ASSERT_LE(planned.cancel_after, 10);
    for (const int32_t id : planned.request.token_ids().ids()) {
      ASSERT_GE(id, 3);
      ASSERT_LT(id, 100);
    }
  }
  EXPECT_NEAR(high, 2000, 200);
  EXPECT_NEAR(low, 3000, 200);
  EXPECT_NEAR(cancelled, 1000, 150);
  EXPECT_NEAR(slow, 4000, 200);
}

TEST(ReportTest, JsonAndTextTellTheSame) {
  Report report;
  report.elapsed = absl::Seconds(2);
  report.started = 10;
  report.finished = 7;
  report.tokens = 100;
  report.finished_tokens = 80;
  report.errors["RESOURCE_EXHAUSTED"] = 3;
  report.first_token.Add(absl::Milliseconds(5));
  const nlohmann::json json = nlohmann::json::parse(ToJson(report));
  EXPECT_EQ(json["failed"], 3);
  EXPECT_EQ(json["errors"]["RESOURCE_EXHAUSTED"], 3);
  EXPECT_EQ(json["tokens_per_s"], 50.0);
  EXPECT_EQ(json["finished_tokens_per_s"], 40.0);
  EXPECT_NEAR(json["first_token"]["p99"].get<double>(), 0.005, 0.0001);
  EXPECT_THAT(ToText(report), HasSubstr("RESOURCE_EXHAUSTED: 3"));
  EXPECT_THAT(ToText(report), HasSubstr("50 tokens/s"));
}

TEST(WorkloadTest, EverySessionHasItsTurnBeforeAnyHasAnother) {
  WorkloadOptions options;
  options.vocab_size = 100;
  options.sessions = 1000;
  std::vector<std::string> ids;
  for (int64_t i = 0; i < 2000; ++i) ids.push_back(PlanRequest(options, i).request.session_id());
  const auto half = ids.begin() + 1000;
  EXPECT_EQ(std::set<std::string>(ids.begin(), half).size(), 1000u);
  EXPECT_EQ(std::set<std::string>(half, ids.end()).size(), 1000u);
  EXPECT_TRUE(std::set<std::string>(ids.begin(), half).contains(SessionId(999)));
  EXPECT_NE(ids[1], SessionId(1));
}

TEST(SessionReportTest, SaysWhatItMeasured) {
  SessionReport report;
  report.elapsed = absl::Seconds(2);
  report.created = 10;
  report.memory_before = 1'000;
  report.memory_after = 21'000;
  report.errors["ALREADY_EXISTS"] = 3;
  EXPECT_EQ(report.memory_per_session(), 2'000);
  EXPECT_THAT(ToText(report), HasSubstr("10 sessions made in 2.00 s, 5 a second"));
  EXPECT_THAT(ToText(report), HasSubstr("ALREADY_EXISTS: 3"));
  const nlohmann::json json = nlohmann::json::parse(ToJson(report));
  EXPECT_EQ(json["memory_per_session"], 2'000);
  EXPECT_EQ(json["errors"]["ALREADY_EXISTS"], 3);
}

}  // namespace
}  // namespace mmfree
