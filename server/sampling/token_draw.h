// One draw of a token as data: what README.md's steps work on, for whoever has the logits.
#ifndef MMFREE_SERVER_SAMPLING_TOKEN_DRAW_H_
#define MMFREE_SERVER_SAMPLING_TOKEN_DRAW_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/sampling/filters.h"
#include "server/sampling/penalties.h"
#include "server/sampling/sampler.h"
#include "server/sampling/token_mask.h"

namespace mmfree {

// What TokenSampler::Describe fills in. Temperature, seed and candidate stay SamplingParams'. Spans
// belong to the sampler and the params: valid until the next token is appended. Masks that are the
// same object are the same set, so that a device can keep copies of them.
struct TokenDraw {
  // Choices are the ids that are in both masks; then `ends` are chosen exactly where they may end
  // the output and are allowed; then `banned` are not. None of them: SampledToken::token is -1.
  bool nothing = false;                         // there are no choices
  std::shared_ptr<const TokenMask> allowed;     // null: all ids
  std::shared_ptr<const TokenMask> constraint;  // null: all ids
  bool may_end = false;
  absl::Span<const int32_t> ends;
  absl::Span<const int32_t> banned;

  absl::Span<const std::pair<int32_t, float>> bias;  // of distinct ids
  PenaltyOptions penalties;
  absl::Span<const TokenCount> window;   // distinct, for the repetition penalty
  absl::Span<const TokenCount> emitted;  // distinct, for the others
  FilterOptions filters;
  DrawLogprobs logprobs = DrawLogprobs::kNone;
  int32_t top_logprobs = 0;
};

// The choices of a draw, of ids in [0, vocab_size).
TokenMask ChoicesOf(const TokenDraw& draw, int64_t vocab_size);

// Makes the draw, as README.md defines it: the definition for every device. Thread-safe.
SampledToken DrawToken(const TokenDraw& draw, absl::Span<const float> logits,
                       const SamplingParams& params, uint64_t position);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_TOKEN_DRAW_H_
