#include "server/scheduler/admission_control.h"

#include <gtest/gtest.h>

namespace mmfree {
namespace {

constexpr size_t kIndex = static_cast<size_t>(Priority::kNormal);

AdmissionControl::Counts Waiting(int64_t requests, int64_t tokens) {
  AdmissionControl::Counts counts;
  counts.waiting[kIndex] = requests;
  counts.waiting_tokens = tokens;
  return counts;
}
AdmissionControl::Counts Running(int64_t requests) {
  AdmissionControl::Counts counts;
  counts.running[kIndex] = requests;
  return counts;
}

TEST(AdmissionControlTest, RequestsBeyondTheQueueAreRefusedAndAFreeSlotCounts) {
  AdmissionControl admission({.capacity = 2, .max_queue = 1, .max_queue_tokens = 1000});
  const auto admit = [&admission] { return admission.Admit(Priority::kNormal, 1).code(); };
  for (int i = 0; i < 3; ++i) EXPECT_EQ(admit(), absl::StatusCode::kOk);
  EXPECT_EQ(admit(), absl::StatusCode::kResourceExhausted);
  // Getting a slot does not make room, nor losing it; ending does.
  admission.Apply(Waiting(-2, -2));
  admission.Apply(Running(2));
  EXPECT_EQ(admit(), absl::StatusCode::kResourceExhausted);
  AdmissionControl::Counts evicted = Running(-1);
  evicted.evicted[kIndex] = 1;
  admission.Apply(evicted);
  EXPECT_EQ(admit(), absl::StatusCode::kResourceExhausted);
  admission.Apply(Running(-1));
  EXPECT_EQ(admit(), absl::StatusCode::kOk);
  admission.Apply(Waiting(-2, -2));
  evicted = AdmissionControl::Counts();
  evicted.evicted[kIndex] = -1;
  admission.Apply(evicted);
  EXPECT_TRUE(admission.empty());
}

TEST(AdmissionControlTest, PromptTokensThatWaitAreBounded) {
  AdmissionControl admission({.capacity = 2, .max_queue = 100, .max_queue_tokens = 1000});
  EXPECT_TRUE(admission.Admit(Priority::kNormal, 600).ok());
  EXPECT_EQ(admission.Admit(Priority::kNormal, 401).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(admission.Admit(Priority::kNormal, 400).ok());
  EXPECT_EQ(admission.Admit(Priority::kNormal, 1).code(), absl::StatusCode::kResourceExhausted);
  admission.Apply(Waiting(-1, -600));
  EXPECT_TRUE(admission.Admit(Priority::kNormal, 600).ok());
  EXPECT_EQ(admission.waiting_tokens(), 1000);
}

TEST(AdmissionControlTest, APromptThatCanNeverWaitIsNotToldToComeAgain) {
  AdmissionControl admission({.capacity = 2, .max_queue = 100, .max_queue_tokens = 1000});
  EXPECT_EQ(admission.Admit(Priority::kNormal, 1001).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(admission.empty());
  EXPECT_TRUE(admission.Admit(Priority::kNormal, 1000).ok());
}

TEST(AdmissionControlTest, AFullQueueNamesItsLimits) {
  AdmissionControl admission({.capacity = 1, .max_queue = 4, .max_queue_tokens = 1000});
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(admission.Admit(Priority::kNormal, 1).ok());
  // None has been given its slot yet: that is no fifth one that waits.
  EXPECT_EQ(
      admission.Admit(Priority::kNormal, 1).message(),
      "the queue is full: 5 requests are admitted, of which 1 can run at once and 4 may wait");
}

TEST(AdmissionControlTest, SeveralRequestsAreAdmittedTogetherOrNotAtAll) {
  AdmissionControl admission({.capacity = 2, .max_queue = 2, .max_queue_tokens = 1000});
  EXPECT_FALSE(admission.Admit(Priority::kNormal, 10, 5).ok());
  EXPECT_TRUE(admission.empty());
  EXPECT_TRUE(admission.Admit(Priority::kNormal, 10, 4).ok());
  EXPECT_EQ(admission.waiting(), 4);
}

}  // namespace
}  // namespace mmfree
