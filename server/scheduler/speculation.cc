#include "server/scheduler/speculation.h"

#include <algorithm>
#include <utility>

#include "server/scheduler/prompt_lookup.h"
#include "server/scheduler/request_state.h"

namespace mmfree {
namespace {

// Tokens without proposals after a run of wrong ones at most.
constexpr int64_t kLongestSkip = 16;

}  // namespace

Speculation::Speculation(int32_t max_tokens, std::vector<int32_t> context)
    : max_tokens_(max_tokens), context_(std::move(context)), limit_(max_tokens) {}

void Speculation::Append(int32_t token) {
  if (context_.size() >= 2 * kLookupWindow) {
    context_.erase(context_.begin(), context_.end() - kLookupWindow);
  }
  context_.push_back(token);
}

void Speculation::Extend(const RequestState& request, int64_t room, StepRow* row) {
  if (skip_ > 0) {
    --skip_;
    return;
  }
  // The last token that can be emitted is not fed.
  const int64_t useful = request.max_new_tokens - request.emitted - 1;
  const int64_t count = std::min({limit_, room, useful});
  if (count <= 0) return;
  const std::vector<int32_t> proposals = LookUpContinuation(context_, static_cast<size_t>(count));

  tokens_ = {request.last_token};
  samplers_.clear();
  sampling_ = {request.sampling};
  const RequestSampler* sampler = request.sampler.get();
  for (const int32_t proposal : proposals) {
    const std::vector<int32_t>& ends = request.end_tokens;
    if (std::find(ends.begin(), ends.end(), proposal) != ends.end()) break;
    SamplingParams params = request.sampling;
    const int64_t emitted = request.emitted + static_cast<int64_t>(tokens_.size());
    if (emitted >= request.min_new_tokens) params.banned = {};
    if (sampler != nullptr) {
      std::unique_ptr<RequestSampler> next = sampler->Clone();
      next->Append(proposal);
      if (next->dead()) break;
      params.sampler = next.get();
      sampler = next.get();
      samplers_.push_back(std::move(next));
    }
    tokens_.push_back(proposal);
    sampling_.push_back(params);
  }
  if (tokens_.size() == 1) return;
  row->tokens = tokens_;
  row->inner = absl::MakeConstSpan(sampling_).first(sampling_.size() - 1);
  row->sampling = &sampling_.back();
  row->rewindable = true;
}

void Speculation::Learn(int64_t proposed, int64_t accepted) {
  if (accepted == proposed) {
    limit_ = std::min(2 * limit_, max_tokens_);
  } else {
    limit_ = std::max<int64_t>(accepted, 1);
  }
  misses_ = accepted > 0 ? 0 : misses_ + 1;
  skip_ = std::min(misses_, kLongestSkip);
}

}  // namespace mmfree
