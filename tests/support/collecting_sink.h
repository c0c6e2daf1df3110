// Sinks that keep what they are given, so that a test can wait for it.
#ifndef MMFREE_TESTS_SUPPORT_COLLECTING_SINK_H_
#define MMFREE_TESTS_SUPPORT_COLLECTING_SINK_H_

#include <atomic>
#include <cstddef>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/scheduler/request.h"

namespace mmfree {

// Fails the test when the scheduler breaks the contract of GenerationSink: a call after the end,
// two at once, or no tokens. Thread-safe.
class CollectingSink final : public GenerationSink {
 public:
  // A client that reads: takes everything at once. One that does not: the backlog is what came.
  enum class Reader { kEager, kIdle };
  explicit CollectingSink(Reader reader = Reader::kEager) : reading_(reader == Reader::kEager) {}

  void OnTokens(absl::Span<const SampledToken> tokens) override;
  void OnFinished(const absl::StatusOr<GenerationResult>& result) override;
  size_t backlog() const override;

  // The client takes everything that has come, and from now on what comes.
  void StartReading();
  // The client takes `tokens` more.
  void Read(size_t tokens);

  // Each blocks until it is so.
  const absl::StatusOr<GenerationResult>& WaitForEnd();
  void WaitForTokens(size_t tokens);

  bool ended() const;
  // Tokens so far; the ids alone.
  std::vector<SampledToken> tokens() const;
  std::vector<int32_t> ids() const;
  // Calls of OnTokens.
  int deliveries() const;

 private:
  std::atomic<bool> in_call_{false};
  mutable absl::Mutex mutex_;
  bool reading_ ABSL_GUARDED_BY(mutex_);
  size_t taken_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<SampledToken> tokens_ ABSL_GUARDED_BY(mutex_);
  int deliveries_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<absl::StatusOr<GenerationResult>> result_ ABSL_GUARDED_BY(mutex_);
};

// Thread-safe.
class CollectingScoreSink final : public ScoreSink {
 public:
  void OnScored(absl::StatusOr<ScoreResult> result) override;
  const absl::StatusOr<ScoreResult>& WaitForEnd();

 private:
  absl::Mutex mutex_;
  std::optional<absl::StatusOr<ScoreResult>> result_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_COLLECTING_SINK_H_
