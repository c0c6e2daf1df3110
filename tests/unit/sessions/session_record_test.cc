#include "server/sessions/session_record.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

SessionRecord SomeRecord() {
  SessionRecord record;
  record.name = {"alice", "chat-1"};
  record.model = "tales";
  record.model_digest = std::string(64, 'd');
  record.kept = {{3, 77, 10, 1000}, {4, ~uint64_t{0}, 20, 1100}};
  record.create_time = absl::FromUnixMicros(1'000'001);
  record.last_use_time = absl::FromUnixMicros(2'000'002);
  record.ttl = absl::Hours(5);
  return record;
}

TEST(SessionRecord, ComesBackWhole) {
  const auto decoded = DecodeRecord(EncodeRecord(SomeRecord()));
  ASSERT_THAT(decoded, IsOk());
  const SessionInfo info = decoded->Info();
  EXPECT_EQ(info.name, (SessionName{"alice", "chat-1"}));
  EXPECT_EQ(info.model, "tales");
  EXPECT_EQ(info.model_digest, std::string(64, 'd'));
  EXPECT_EQ(info.turn, 4u);
  EXPECT_EQ(info.oldest_turn, 3u);
  EXPECT_EQ(info.token_count, 20);
  EXPECT_EQ(info.bytes, 2100);
  EXPECT_EQ(info.create_time, SomeRecord().create_time);
  EXPECT_EQ(info.expire_time, SomeRecord().last_use_time + absl::Hours(5));
  EXPECT_EQ(decoded->Find(3)->revision, 77u);
  EXPECT_EQ(decoded->present().revision, ~uint64_t{0});
  EXPECT_EQ(decoded->Find(5), nullptr);
}

TEST(SessionRecord, WithoutTimeToLiveNeverExpires) {
  SessionRecord record = SomeRecord();
  record.ttl = absl::InfiniteDuration();
  EXPECT_EQ(DecodeRecord(EncodeRecord(record))->Info().expire_time, absl::InfiniteFuture());
}

TEST(SessionRecord, EveryFlippedBitAndTruncationIsDataLoss) {
  const std::string bytes = EncodeRecord(SomeRecord());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    EXPECT_THAT(DecodeRecord(damaged), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << bit;
  }
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THAT(DecodeRecord(bytes.substr(0, size)),
                StatusIs(absl::StatusCode::kDataLoss, testing::_));
  }
}

}  // namespace
}  // namespace mmfree
