#include "server/sampling/request_sampler.h"

#include <algorithm>

namespace mmfree {
namespace {

// Null when that is every id.
std::shared_ptr<const TokenMask> AllowedIds(const RequestSampler::Options& options,
                                            int64_t vocab_size) {
  if (options.allowed.empty() && options.banned.empty()) return nullptr;
  auto mask = std::make_shared<TokenMask>(vocab_size, options.allowed.empty());
  for (const int32_t id : options.allowed) mask->Add(id);
  for (const int32_t id : options.banned) mask->Remove(id);
  return mask;
}

}  // namespace

RequestSampler::RequestSampler(const Options& options, int64_t vocab_size,
                               absl::Span<const int32_t> context)
    : rules_(std::make_shared<const Rules>(
          Rules{options, vocab_size, AllowedIds(options, vocab_size)})),
      penalties_(options.penalties, context) {
  if (options.constraint != nullptr) {
    constraint_.emplace(options.constraint, options.starts_text);
  }
}

void RequestSampler::Append(int32_t token) {
  penalties_.Append(token);
  if (constraint_.has_value()) constraint_->Append(token);
}

TokenDraw RequestSampler::Draw(const SamplingParams& params) const {
  const Options& options = rules_->options;
  TokenDraw draw;
  draw.allowed = rules_->allowed;
  if (constraint_.has_value()) {
    draw.constraint = constraint_->Mask();
    draw.nothing = draw.constraint == nullptr;
    draw.may_end = constraint_->complete();
  }
  // An end token's own text is not what it is sampled for.
  draw.ends = options.end_tokens;
  draw.banned = params.banned;
  // A complete output that nothing can follow ends before min_new_tokens.
  if (draw.may_end && !draw.banned.empty() && ChoicesOf(draw, rules_->vocab_size).First() < 0) {
    draw.banned = {};
  }
  draw.bias = options.bias;
  draw.penalties = options.penalties;
  draw.window = penalties_.window();
  draw.emitted = penalties_.emitted();
  draw.filters = options.filters;
  draw.logprobs = options.logprobs;
  draw.top_logprobs = options.top_logprobs;
  return draw;
}

std::vector<Exclusion> RequestSampler::WhyNothing(const SamplingParams& params) const {
  const Options& options = rules_->options;
  const TokenDraw draw = Draw(params);
  if (draw.nothing) return {Exclusion::kBounds};
  std::vector<Exclusion> exclusions;
  std::vector<Exclusion> others;
  const auto add = [&](bool present, Exclusion exclusion, const auto& lift) {
    if (!present) return;
    TokenDraw without = draw;
    lift(&without);
    (ChoicesOf(without, rules_->vocab_size).First() >= 0 ? exclusions : others)
        .push_back(exclusion);
  };
  const auto without_ids = [&](bool allowed) {
    return [this, allowed](TokenDraw* d) {
      Options rest = rules_->options;
      (allowed ? rest.allowed : rest.banned).clear();
      d->allowed = AllowedIds(rest, rules_->vocab_size);
    };
  };
  add(!options.allowed.empty(), Exclusion::kAllowedIds, without_ids(true));
  add(!options.banned.empty(), Exclusion::kBannedIds, without_ids(false));
  const bool would_go_on = std::any_of(draw.ends.begin(), draw.ends.end(), [&draw](int32_t id) {
    return draw.constraint != nullptr && draw.constraint->Has(id);
  });
  add(would_go_on && !draw.may_end, Exclusion::kStopTokens, [](TokenDraw* d) { d->ends = {}; });
  // Several at once, if there is a token that goes on at all.
  TokenDraw alone = draw;
  alone.allowed = nullptr;
  alone.ends = {};
  alone.banned = {};
  if (exclusions.empty() && ChoicesOf(alone, rules_->vocab_size).First() >= 0) exclusions = others;
  if (constraint_.has_value()) exclusions.insert(exclusions.begin(), Exclusion::kConstraint);
  return exclusions;
}

SampledToken RequestSampler::Sample(absl::Span<const float> logits, const SamplingParams& params,
                                    uint64_t position) {
  return DrawToken(Draw(params), logits, params, position);
}

bool RequestSampler::Describe(const SamplingParams& params, TokenDraw* draw) const {
  *draw = Draw(params);
  return true;
}

}  // namespace mmfree
