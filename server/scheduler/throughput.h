// What steps take, by their contents, and how often a request leaves: the measurements behind the
// estimated wait, the deadlines that cannot be met and the prompt tokens of a step.
#ifndef MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
#define MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/time/time.h"

namespace mmfree {

// Exponential averages over busy time, so that idle hours do not count. Not thread-safe.
class Throughput {
 public:
  // `full_chunk`: prompt tokens from which on a step is as good as any at feeding prompts.
  explicit Throughput(int64_t full_chunk) : full_chunk_(full_chunk) {}

  // A step took `time`, and `left` requests ended since the one before.
  void Observe(absl::Duration time, int64_t decode_rows, int64_t prompt_tokens, int64_t left) {
    ++steps_;
    step_ = Blend(step_, time);
    if (prompt_tokens == 0) {
      decode_step_ = Blend(decode_step_, time);
    } else {
      // What decoding rows add is known from steps without prompts, roughly; a prompt's share is
      // the rest, but never nothing.
      const absl::Duration decoding = decode_rows > 0 ? decode_step_ : absl::ZeroDuration();
      const absl::Duration token = std::max(time - decoding, time / 8) / prompt_tokens;
      prompt_token_ = Blend(prompt_token_, token);
      if (prompt_tokens >= full_chunk_) full_chunk_token_ = Blend(full_chunk_token_, token);
    }
    since_departure_ += time;
    if (left == 0) return;
    per_departure_ = Blend(per_departure_, since_departure_ / left);
    since_departure_ = absl::ZeroDuration();
  }

  // How long a request that arrives now waits for its first step to end, when `departures` others
  // have to end first to leave it a slot. A departure that is outstanding for longer than the
  // average counts as long as it has taken.
  absl::Duration EstimatedWait(int64_t departures) const {
    return std::max(per_departure_, since_departure_) * departures + step_;
  }

  // The least time that feeding so many prompt tokens and then emitting `new_tokens` takes, when
  // nothing stands in the way; zero while too little has been measured. Only steps with a full
  // chunk tell what a long prompt takes: a step costs time whatever it holds, so that a token of a
  // tiny prompt can take a hundred times as long as one of a long prompt.
  absl::Duration ServiceTime(int64_t prompt_tokens, int64_t new_tokens) const {
    if (steps_ < kStepsToTrust) return absl::ZeroDuration();
    return full_chunk_token_ * prompt_tokens + decode_step_ * std::max<int64_t>(new_tokens - 1, 0);
  }

  // Prompt tokens that a step with decoding rows has time for: until `target` in all, or as long
  // again as decoding takes when that is more. At least kMinPromptTokens.
  int64_t PromptBudget(absl::Duration target) const {
    if (steps_ < kStepsToTrust || prompt_token_ <= absl::ZeroDuration()) {
      return std::numeric_limits<int32_t>::max();
    }
    const absl::Duration left = std::max(target - decode_step_, decode_step_);
    return std::clamp<int64_t>(static_cast<int64_t>(absl::FDivDuration(left, prompt_token_)),
                               kMinPromptTokens, std::numeric_limits<int32_t>::max());
  }

  absl::Duration step() const { return step_; }

 private:
  static constexpr int64_t kStepsToTrust = 16;
  static constexpr int64_t kMinPromptTokens = 16;

  static absl::Duration Blend(absl::Duration average, absl::Duration sample) {
    return average == absl::ZeroDuration() ? sample : average + (sample - average) / 16;
  }

  int64_t full_chunk_;
  int64_t steps_ = 0;
  absl::Duration step_;
  absl::Duration decode_step_;       // of steps without prompts
  absl::Duration prompt_token_;      // of steps with prompts, what decoding took aside
  absl::Duration full_chunk_token_;  // of those with a full chunk
  absl::Duration per_departure_;
  absl::Duration since_departure_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
