// Draws the tokens of one generation that asks for more than temperature and seed. README.md
// defines every operation and the order they are applied in.
#ifndef MMFREE_SERVER_SAMPLING_REQUEST_SAMPLER_H_
#define MMFREE_SERVER_SAMPLING_REQUEST_SAMPLER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/sampling/constraint.h"
#include "server/sampling/dead_end.h"
#include "server/sampling/filters.h"
#include "server/sampling/penalties.h"
#include "server/sampling/token_draw.h"
#include "server/sampling/token_mask.h"

namespace mmfree {

// Thread-compatible: the backend calls Sample during a step, which changes nothing, the step thread
// the rest between steps.
class RequestSampler final : public TokenSampler {
 public:
  using Logprobs = DrawLogprobs;

  // Validated by the caller: ids in [0, vocab_size), every number in the range that the proto
  // gives.
  struct Options {
    std::vector<int32_t> allowed;  // empty: all
    std::vector<int32_t> banned;
    std::vector<std::pair<int32_t, float>> bias;  // of distinct ids
    PenaltyOptions penalties;
    FilterOptions filters;
    std::shared_ptr<CompiledConstraint> constraint;  // null: none
    bool starts_text = false;                        // as ConstraintCursor
    std::vector<int32_t> end_tokens;                 // with a constraint: those that end the output
    Logprobs logprobs = Logprobs::kModel;
    int top_logprobs = 0;

    // Whether the backends' own sampling would give the same.
    bool plain() const {
      return allowed.empty() && banned.empty() && bias.empty() && !penalties.any() &&
             !filters.any() && constraint == nullptr && logprobs != Logprobs::kSampling &&
             top_logprobs == 0;
    }
  };

  // `context`: the tokens before the output, for repetition_penalty.
  RequestSampler(const Options& options, int64_t vocab_size, absl::Span<const int32_t> context);

  // Temperature, seed, candidate and banned ids are those of `params`.
  SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                      uint64_t position) override;
  bool Describe(const SamplingParams& params, TokenDraw* draw) const override;

  // The token was emitted: it is part of the context of the next Sample.
  void Append(int32_t token);

  // Whether a token was appended that the constraint excludes: nothing can follow.
  bool dead() const { return constraint_.has_value() && constraint_->dead(); }

  // Why a draw with these params has no choices: the constraint, and what else, taken away alone,
  // would leave some; where it takes several, all that there are.
  std::vector<Exclusion> WhyNothing(const SamplingParams& params) const;

  // One that goes on from here by itself.
  std::unique_ptr<RequestSampler> Clone() const { return std::make_unique<RequestSampler>(*this); }

 private:
  TokenDraw Draw(const SamplingParams& params) const;

  // What clones have in common.
  struct Rules {
    Options options;
    int64_t vocab_size;
    std::shared_ptr<const TokenMask> allowed;  // less banned; null: all
  };
  const std::shared_ptr<const Rules> rules_;
  Penalties penalties_;
  std::optional<ConstraintCursor> constraint_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_REQUEST_SAMPLER_H_
