// A backend whose outputs are a hash of the tokens a slot was fed: wrong slots, positions, order or
// stale states change every token that follows. It checks each call against the contract of
// backend.h, keeps a record of the steps, and lets a test hold them up or make them fail.
#ifndef MMFREE_TESTS_SUPPORT_FAKE_BACKEND_H_
#define MMFREE_TESTS_SUPPORT_FAKE_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "tests/support/fake_clock.h"

namespace mmfree {

struct FakeBackendOptions {
  int32_t num_slots = 4;
  int32_t resident_slots = 0;
  int32_t max_step_tokens = 1 << 20;
  int32_t vocab_size = 97;
  FakeClock* clock = nullptr;  // advanced by step_time in each step
  absl::Duration step_time;
  absl::Duration token_time;  // and by this for each token
};

// The test's side of a fake backend, alive after the backend is gone. Thread-safe.
class FakeDevice {
 public:
  struct Row {
    int32_t slot = 0;
    uint64_t position = 0;
    int32_t tokens = 0;
    bool sampled = false;
    bool scored = false;
    bool banned = false;
  };
  using StepRecord = std::vector<Row>;

  explicit FakeDevice(const FakeBackendOptions& options);

  // A backend of this device; the step loop or the engine takes it.
  static std::unique_ptr<Backend> MakeBackend(std::shared_ptr<FakeDevice> device);

  // Holds up every further step before it does anything, until ReleaseSteps or OpenGate.
  void CloseGate();
  // Lets `steps` steps through the closed gate.
  void ReleaseSteps(int steps);
  void OpenGate();
  // Blocks until a step waits at the gate.
  void WaitUntilHeldUp();

  // The next call of Step, or of ZeroSlot, returns this.
  void FailNextStep(absl::Status status);
  void FailNextZeroSlot(absl::Status status);
  // From now on every `period`th call of ReadResident fails with DATA_LOSS; 0: none.
  void FailResidentReads(int period);

  // Steps that were done (failed ones are not).
  std::vector<StepRecord> steps() const;
  int64_t num_steps() const;
  // Blocks until `steps` have been done in all.
  void WaitForSteps(int64_t steps);
  // Calls that broke the contract of Backend: must stay empty.
  std::vector<std::string> violations() const;

  // What a lone request gets for `prompt`: the tokens an unlimited generation would sample.
  std::vector<SampledToken> Expected(absl::Span<const int32_t> prompt, SamplingParams sampling,
                                     int count) const;
  // The score of `target` (-1: none) after `tokens`.
  TokenScore ExpectedScore(absl::Span<const int32_t> tokens, int32_t target) const;
  std::vector<float> ExpectedLogits(absl::Span<const int32_t> tokens) const;
  // The state of a slot that was fed `tokens`, as ReadSlot gives it.
  static std::vector<float> ExpectedState(absl::Span<const int32_t> tokens);

  const FakeBackendOptions& options() const { return options_; }

 private:
  friend class FakeBackend;

  const FakeBackendOptions options_;
  mutable absl::Mutex mutex_;
  bool gate_closed_ ABSL_GUARDED_BY(mutex_) = false;
  int permits_ ABSL_GUARDED_BY(mutex_) = 0;
  bool held_up_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status next_step_ ABSL_GUARDED_BY(mutex_);
  absl::Status next_zero_ ABSL_GUARDED_BY(mutex_);
  int fail_reads_ ABSL_GUARDED_BY(mutex_) = 0;
  int reads_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<StepRecord> steps_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> violations_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_FAKE_BACKEND_H_
