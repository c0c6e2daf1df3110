#include "server/sessions/store_health.h"

#include "gtest/gtest.h"

namespace mmfree {
namespace {

using Call = StoreHealth::Call;

const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);
const absl::Status kOk;
const absl::Status kAway = absl::UnavailableError("away");
const StoreHealth::Options kOptions = {
    .interval = absl::Seconds(10), .first_retry = absl::Seconds(1), .max_retry = absl::Seconds(5)};

TEST(StoreHealth, IsUsableAndProbedAtOnceInTheBeginning) {
  const StoreHealth health(kOptions, kStart);
  EXPECT_TRUE(health.usable());
  EXPECT_EQ(health.next_probe(), kStart);
}

TEST(StoreHealth, AReadThatWorksSaysNothingOfWrites) {
  StoreHealth health(kOptions, kStart);
  health.Note(Call::kWrite, kAway, 100, kStart);
  EXPECT_FALSE(health.usable());
  health.Note(Call::kRead, kOk, 0, kStart);
  health.Note(Call::kRemove, kOk, 0, kStart);
  health.Note(Call::kWrite, absl::AbortedError("moved on"), 100, kStart);
  EXPECT_FALSE(health.usable());
  health.Note(Call::kWrite, kOk, 100, kStart);
  EXPECT_TRUE(health.usable());
  health.Note(Call::kRead, kAway, 0, kStart);
  EXPECT_FALSE(health.usable());
  health.Note(Call::kRead, absl::NotFoundError("none"), 0, kStart);
  EXPECT_TRUE(health.usable());
}

TEST(StoreHealth, AnswersAboutASessionAreNoFailures) {
  StoreHealth health(kOptions, kStart);
  for (const absl::Status& answer :
       {absl::NotFoundError(""), absl::AbortedError(""), absl::DataLossError(""),
        absl::AlreadyExistsError(""), absl::ResourceExhaustedError("")}) {
    for (const Call call : {Call::kRead, Call::kRemove, Call::kWrite}) {
      health.Note(call, answer, 0, kStart);
    }
  }
  EXPECT_TRUE(health.usable());
  health.NoteProbe(absl::DataLossError(""), kStart);
  EXPECT_FALSE(health.usable());
}

TEST(StoreHealth, WritesThatWorkPutTheProbeOff) {
  StoreHealth health(kOptions, kStart);
  health.NoteProbe(kOk, kStart);
  EXPECT_EQ(health.next_probe(), kStart + absl::Seconds(10));
  health.Note(Call::kWrite, kOk, 100, kStart + absl::Seconds(7));
  EXPECT_EQ(health.next_probe(), kStart + absl::Seconds(17));
  health.Note(Call::kRead, kOk, 0, kStart + absl::Seconds(9));
  EXPECT_EQ(health.next_probe(), kStart + absl::Seconds(17));
}

TEST(StoreHealth, ProbesOfAFailingStoreBackOffWhateverElseFails) {
  StoreHealth health(kOptions, kStart);
  health.NoteProbe(kOk, kStart);
  absl::Time now = kStart + absl::Seconds(3);
  health.Note(Call::kWrite, kAway, 0, now);
  for (const int pause : {1, 2, 4, 5, 5}) {
    EXPECT_EQ(health.next_probe(), now + absl::Seconds(pause));
    health.Note(Call::kRead, kAway, 0, now + absl::Milliseconds(500));
    health.Note(Call::kWrite, kAway, 0, now + absl::Milliseconds(600));
    EXPECT_EQ(health.next_probe(), now + absl::Seconds(pause));
    now = health.next_probe();
    health.NoteProbe(kAway, now);
  }
  health.NoteProbe(kOk, now);
  EXPECT_TRUE(health.usable());
  EXPECT_EQ(health.next_probe(), now + absl::Seconds(10));
  health.NoteProbe(kAway, now);
  EXPECT_EQ(health.next_probe(), now + absl::Seconds(1));
}

TEST(StoreHealth, AProbeIsAsLargeAsWhatCouldNotBeWritten) {
  StoreHealth health(kOptions, kStart);
  EXPECT_EQ(health.probe_bytes(), StoreHealth::kProbeBytes);
  health.Note(Call::kWrite, kAway, 300'000, kStart);
  health.Note(Call::kWrite, kAway, 20'000, kStart);
  health.NoteProbe(kAway, kStart);
  EXPECT_EQ(health.probe_bytes(), 300'000);
  health.NoteProbe(kOk, kStart);
  EXPECT_EQ(health.probe_bytes(), StoreHealth::kProbeBytes);
}

}  // namespace
}  // namespace mmfree
