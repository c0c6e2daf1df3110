// A transport that the test plays.
#ifndef MMFREE_TESTS_UNIT_RPC_FAKE_WRITER_H_
#define MMFREE_TESTS_UNIT_RPC_FAKE_WRITER_H_

#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "server/rpc/generation_stream.h"

namespace mmfree {

// A transport that completes writes when the test says so. Fails the test when the caller breaks
// the contract of EventWriter.
class FakeWriter final : public EventWriter {
 public:
  void Write(const v1::GenerateResponse& event) override {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(writing_) << "a write while one is in flight";
    EXPECT_FALSE(status_.has_value()) << "a write after the end";
    writing_ = true;
    events_.push_back(event);
  }
  void WriteLast(const v1::GenerateResponse& event) override {
    Write(event);
    absl::MutexLock lock(&mu_);
    writing_ = false;
    status_ = absl::OkStatus();
  }
  void Finish(const absl::Status& status) override {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(writing_) << "finished while a write is in flight";
    EXPECT_FALSE(status_.has_value()) << "finished twice";
    status_ = status;
  }

  // Whether there was a write to complete.
  bool CompleteWrite(EventSource* source, bool ok = true) {
    {
      absl::MutexLock lock(&mu_);
      if (!writing_) return false;
      writing_ = false;
    }
    source->OnWriteDone(ok);
    return true;
  }
  void CompleteAll(EventSource* source) {
    while (CompleteWrite(source)) {
    }
  }

  std::vector<v1::GenerateResponse> events() const {
    absl::MutexLock lock(&mu_);
    return events_;
  }
  std::optional<absl::Status> status() const {
    absl::MutexLock lock(&mu_);
    return status_;
  }
  void AwaitWriteOrEnd() const {
    absl::MutexLock lock(&mu_);
    const auto ready = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return writing_ || status_.has_value();
    };
    mu_.Await(absl::Condition(&ready));
  }

 private:
  mutable absl::Mutex mu_;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<v1::GenerateResponse> events_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_RPC_FAKE_WRITER_H_
