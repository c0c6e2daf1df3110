// What steps take, by their contents, and how much of what they ask for generations use: the
// measurements behind the estimated wait, the deadlines that cannot be met and the prompt tokens of
// a step.
#ifndef MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
#define MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/time/time.h"
#include "server/scheduler/work_ahead.h"

namespace mmfree {

// Exponential averages over busy time, so that idle hours do not count. Not thread-safe.
class Throughput {
 public:
  // `full_chunk`: prompt tokens from which on a step is as good as any at feeding prompts.
  explicit Throughput(int64_t full_chunk) : full_chunk_(full_chunk) {}

  // A step took `time`.
  void Observe(absl::Duration time, int64_t decode_rows, int64_t prompt_tokens) {
    ++steps_;
    step_ = Blend(step_, time);
    if (prompt_tokens == 0) {
      decode_step_ = Blend(decode_step_, time);
      decode_rows_ +=
          (static_cast<double>(decode_rows) - decode_rows_) / (decode_rows_ > 0 ? kSteps : 1);
      recent_decode_step_ = BlendByTime(recent_decode_step_, time, time);
      // Forgotten as slowly as load comes and goes.
      quick_decode_step_ = quick_decode_step_ == absl::ZeroDuration()
                               ? time
                               : std::min(quick_decode_step_ + quick_decode_step_ / 256, time);
      return;
    }
    // What decoding rows add is known from steps without prompts, roughly; a prompt's share is the
    // rest, but never nothing.
    const auto feeding = [time, decode_rows](absl::Duration decode_step) {
      return decode_rows > 0 ? std::max(time - decode_step, time / 8) : time;
    };
    const absl::Duration token = feeding(decode_step_) / prompt_tokens;
    // A cold start makes the first steps long.
    prompt_token_ =
        steps_ < kStepsToTrust && token < prompt_token_ ? token : Blend(prompt_token_, token);
    if (prompt_tokens >= full_chunk_) full_chunk_token_ = Blend(full_chunk_token_, token);
    // A ratio of averages: a step with few tokens says little of what many cost.
    const double tokens = static_cast<double>(prompt_tokens);
    recent_prompt_time_ = BlendByTime(recent_prompt_time_, feeding(recent_decode_step_), time);
    recent_prompt_tokens_ +=
        (tokens - recent_prompt_tokens_) * (recent_prompt_tokens_ > 0 ? WeightOf(time) : 1);
  }

  // A generation that might end early came to its end: `asked` tokens were allowed and it made
  // `emitted`.
  void ObserveEnd(int64_t asked, int64_t emitted) {
    asked_ += (static_cast<double>(asked) - asked_) / kSteps;
    emitted_ += (static_cast<double>(emitted) - emitted_) / kSteps;
  }

  // Of the tokens that such generations are allowed, the share that they make; 1 while nothing is
  // known.
  double used() const { return emitted_ / asked_; }

  // At present: the averages of about the last half second.
  StepCosts Costs(absl::Duration target) const {
    StepCosts costs;
    costs.step = step_;
    costs.decode_step = recent_decode_step_;
    if (recent_prompt_tokens_ > 0) costs.prompt_token = recent_prompt_time_ / recent_prompt_tokens_;
    costs.prompt_budget = PromptBudget(target, std::numeric_limits<int32_t>::max());
    costs.used = used();
    return costs;
  }

  // The least time that feeding so many prompt tokens and then emitting `new_tokens` takes, when
  // nothing stands in the way; zero while too little has been measured. Only steps with a full
  // chunk tell what a long prompt takes: a step costs time whatever it holds, so that a token of a
  // tiny prompt can take a hundred times as long as one of a long prompt. And only the quickest
  // steps tell what a stream takes that has the device to itself before long.
  absl::Duration ServiceTime(int64_t prompt_tokens, int64_t new_tokens) const {
    if (steps_ < kStepsToTrust) return absl::ZeroDuration();
    return full_chunk_token_ * prompt_tokens +
           quick_decode_step_ * std::max<int64_t>(new_tokens - 1, 0);
  }

  // Prompt tokens that a step with so many decoding rows has time for: until `target` in all, or as
  // long again as decoding takes when that is more. At least kMinPromptTokens; without decoding
  // rows, or before a prompt has been fed, at least a full chunk.
  int64_t PromptBudget(absl::Duration target, int64_t decode_rows) const {
    if (prompt_token_ <= absl::ZeroDuration()) return full_chunk_;
    // Steps without prompts may have been long ago, with more rows: under a flood there are none.
    const double rows = static_cast<double>(decode_rows);
    const absl::Duration decode_step =
        rows < decode_rows_ ? decode_step_ * (rows / decode_rows_) : decode_step_;
    const absl::Duration left = std::max(target - decode_step, decode_step);
    return std::clamp<int64_t>(static_cast<int64_t>(absl::FDivDuration(left, prompt_token_)),
                               decode_rows > 0 ? kMinPromptTokens : full_chunk_,
                               std::numeric_limits<int32_t>::max());
  }

  absl::Duration step() const { return step_; }

 private:
  static constexpr int64_t kStepsToTrust = 16;
  static constexpr int64_t kMinPromptTokens = 16;
  static constexpr int kSteps = 16;  // that an average spans
  static constexpr absl::Duration kRecent = absl::Milliseconds(500);

  static absl::Duration Blend(absl::Duration average, absl::Duration sample) {
    return average == absl::ZeroDuration() ? sample : average + (sample - average) / kSteps;
  }

  // Long steps count for more: a burst of them must show before sixteen have passed.
  static double WeightOf(absl::Duration time) {
    return std::clamp(absl::FDivDuration(time, kRecent), 1.0 / kSteps, 0.5);
  }
  static absl::Duration BlendByTime(absl::Duration average, absl::Duration sample,
                                    absl::Duration time) {
    if (average == absl::ZeroDuration()) return sample;
    return average + (sample - average) * WeightOf(time);
  }

  int64_t full_chunk_;
  int64_t steps_ = 0;
  absl::Duration step_;
  absl::Duration decode_step_;         // of steps without prompts,
  double decode_rows_ = 0;             // and their rows
  absl::Duration recent_decode_step_;  // the same, of late
  absl::Duration quick_decode_step_;   // the quickest of them
  absl::Duration prompt_token_;        // of steps with prompts, what decoding took aside
  absl::Duration full_chunk_token_;    // of those with a full chunk
  absl::Duration recent_prompt_time_;  // of steps with prompts, of late: what prompts took,
  double recent_prompt_tokens_ = 0;    // and their tokens
  // Of generations that may end early; at first as if some had used up all they asked for.
  double asked_ = 64;
  double emitted_ = 64;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_THROUGHPUT_H_
