// Several tokens of one sequence in a step: proposed from its context, verified by the model.
#ifndef MMFREE_SERVER_SCHEDULER_SPECULATION_H_
#define MMFREE_SERVER_SCHEDULER_SPECULATION_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/sampling/request_sampler.h"

namespace mmfree {

struct RequestState;

// Tokens that are proposed in one step over all rows at most.
inline constexpr int64_t kMaxProposedTokens = kMaxKeptStates;

// What a request with speculation keeps. A row feeds the last token and behind it the proposals,
// and samples after each of them exactly as if it stood there alone: with the penalties, the
// constraint and the banned tokens of that place. Samples count as long as the proposals agree with
// them, so the output is that of one token at a time. Not thread-safe.
class Speculation {
 public:
  // `context`: the tokens that proposals are looked up in.
  Speculation(int32_t max_tokens, std::vector<int32_t> context);

  // Tokens that one step can give.
  int64_t max_run() const { return 1 + max_tokens_; }

  // The next token of the context.
  void Append(int32_t token);

  // Makes `row`, that of `request`'s last token, one with up to `room` proposals. What the row
  // points to lives until the next call.
  void Extend(const RequestState& request, int64_t room, StepRow* row);

  // The row's samples agreed with `accepted` of its `proposed` tokens.
  void Learn(int64_t proposed, int64_t accepted);

 private:
  const int64_t max_tokens_;
  std::vector<int32_t> context_;  // the last kLookupWindow tokens, and some more
  int64_t limit_;                 // proposals of the next row: fewer where they were wrong
  int64_t misses_ = 0;            // rows in succession without an accepted one
  int64_t skip_ = 0;              // tokens to wait before the next proposal

  // The row's.
  std::vector<int32_t> tokens_;
  std::vector<std::unique_ptr<RequestSampler>> samplers_;  // of the places behind the first
  std::vector<SamplingParams> sampling_;                   // [tokens]
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_SPECULATION_H_
