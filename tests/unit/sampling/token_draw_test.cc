// A described draw says all there is to it: who knows nothing but the description and takes each
// step of README.md literally, sorting whatever has an order, gets the same bits.
#include "server/sampling/token_draw.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "server/base/philox.h"
#include "server/sampling/request_sampler.h"
#include "server/sampling/sampler.h"
#include "tests/support/random_draws.h"

namespace mmfree {
namespace {

__extension__ using Wide = unsigned __int128;

struct Weighed {
  int32_t id = 0;
  float logit = 0.0f;
  uint64_t weight = 0;
};

class LiteralDraw {
 public:
  LiteralDraw(const TokenDraw& draw, const std::vector<float>& logits) : draw_(draw) {
    for (size_t n = 0; n < logits.size(); ++n) {
      const auto id = static_cast<int32_t>(n);
      const bool allowed = draw.allowed == nullptr || draw.allowed->Has(id);
      bool chosen = allowed && (draw.constraint == nullptr || draw.constraint->Has(id));
      if (IsIn(id, draw.ends)) chosen = draw.may_end && allowed;
      if (IsIn(id, draw.banned)) chosen = false;
      if (chosen) left_.push_back({id, Changed(id, logits[n]), 0});
    }
  }

  int32_t Make(const SamplingParams& params, uint64_t position) {
    if (left_.empty()) return -1;
    std::stable_sort(left_.begin(), left_.end(), Likelier);
    const Weighed best = left_.front();
    if (params.temperature == 0.0f) return best.id;
    inverse_ = 1.0f / params.temperature;
    max_logit_ = best.logit;
    for (Weighed& w : left_) w.weight = LogitWeight(w.logit, max_logit_, inverse_);
    std::erase_if(left_, [](const Weighed& w) { return w.weight == 0; });
    if (left_.empty()) return best.id;
    Filter();
    std::sort(left_.begin(), left_.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
    const uint64_t bits = UniformBits(params.seed, position, params.candidate, 0);
    const uint64_t drawn = MulHigh64(bits, Total());
    uint64_t sum = 0;
    for (const Weighed& w : left_) {
      sum += w.weight;
      if (sum > drawn) return w.id;
    }
    return -2;
  }

 private:
  static bool IsIn(int32_t id, absl::Span<const int32_t> ids) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  }

  float Changed(int32_t id, float l) const {
    for (const auto& [biased, bias] : draw_.bias) {
      if (biased == id) l += bias;
    }
    const PenaltyOptions& penalties = draw_.penalties;
    for (const TokenCount& seen : draw_.window) {
      if (seen.token == id) l = l > 0.0f ? l / penalties.repetition : l * penalties.repetition;
    }
    for (const TokenCount& seen : draw_.emitted) {
      if (seen.token != id) continue;
      l = (l - penalties.frequency * static_cast<float>(seen.count)) - penalties.presence;
    }
    return l;
  }

  // NaN counts as the least likely; ids are in their order already.
  static bool Likelier(const Weighed& a, const Weighed& b) {
    return std::isnan(b.logit) ? !std::isnan(a.logit) : a.logit > b.logit;
  }

  uint64_t Total() const {
    uint64_t total = 0;
    for (const Weighed& w : left_) total += w.weight;
    return total;
  }

  static uint64_t Share(float share, uint64_t total) {
    const auto fixed = static_cast<uint64_t>(std::ldexp(static_cast<double>(share), 40));
    return static_cast<uint64_t>((static_cast<Wide>(fixed) * total + ((Wide{1} << 40) - 1)) >> 40);
  }

  // The shortest prefix whose weights reach the target.
  void KeepPrefix(uint64_t target) {
    uint64_t sum = 0;
    size_t kept = 0;
    while (kept < left_.size() && (kept == 0 || sum < target)) sum += left_[kept++].weight;
    left_.resize(kept);
  }

  void Filter() {
    const FilterOptions& filters = draw_.filters;
    if (filters.top_k > 0 && filters.top_k < left_.size()) left_.resize(filters.top_k);
    if (filters.typical_p < 1.0f) {
      const auto information = [this](const Weighed& w) {
        return static_cast<uint64_t>((max_logit_ - w.logit) * inverse_ * 16777216.0f);
      };
      Wide moment = 0;
      for (const Weighed& w : left_) moment += static_cast<Wide>(w.weight) * information(w);
      const auto mean = static_cast<int64_t>(moment / Total());
      const auto distance = [&](const Weighed& w) {
        return std::abs(static_cast<int64_t>(information(w)) - mean);
      };
      std::sort(left_.begin(), left_.end(), [&](const Weighed& a, const Weighed& b) {
        return distance(a) != distance(b) ? distance(a) < distance(b) : a.id < b.id;
      });
      KeepPrefix(Share(filters.typical_p, Total()));
    }
    if (filters.top_p < 1.0f) {
      std::sort(left_.begin(), left_.end(), [](const Weighed& a, const Weighed& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
      });
      KeepPrefix(Share(filters.top_p, Total()));
    }
    if (filters.min_p > 0.0f) {
      uint64_t largest = 0;
      for (const Weighed& w : left_) largest = std::max(largest, w.weight);
      const uint64_t least = Share(filters.min_p, largest);
      std::erase_if(left_, [least](const Weighed& w) { return w.weight < least; });
    }
  }

  const TokenDraw& draw_;
  std::vector<Weighed> left_;
  float max_logit_ = 0.0f;
  float inverse_ = 0.0f;
};

TEST(TokenDrawTest, IsWhatItsDescriptionSaysTakenLiterally) {
  RandomDraws random(3);
  const int32_t vocabularies[] = {1, 2, 3, 31, 64, 65, 300, 1000, 3000};
  for (int round = 0; round < 3000; ++round) {
    const auto made = random.Make(vocabularies[round % std::size(vocabularies)]);
    const SampledToken sampled = DrawToken(made->draw, made->logits, made->params, made->position);
    ASSERT_EQ(sampled.token,
              LiteralDraw(made->draw, made->logits).Make(made->params, made->position))
        << "round " << round << ": " << made->Name();
    if (sampled.token < 0 || made->draw.logprobs != DrawLogprobs::kModel) continue;
    const float scored = ScoreToken(made->logits, sampled.token).logprob;
    ASSERT_TRUE(scored == sampled.logprob || (std::isnan(scored) && std::isnan(sampled.logprob)))
        << made->Name();
  }
}

// What RequestSampler describes is what it samples, also after more tokens, and masks stay the same
// objects as long as they are the same sets.
TEST(TokenDrawTest, ARequestSamplerDescribesItsNextDraw) {
  const auto trie = std::make_shared<const TokenTrie>(
      std::vector<std::string>{"", "a", "b", "ab", "c", "ca", "1", "12"});
  ConstraintCache cache([&trie] { return Vocabulary{trie, trie}; });
  RequestSampler::Options options;
  options.allowed = {0, 1, 2, 3, 4, 6, 7};
  options.banned = {6};
  options.bias = {{1, 0.5f}, {2, -1.0f}};
  options.penalties = {1.5f, 3, 0.25f, 0.5f};
  options.filters.top_p = 0.9f;
  options.constraint = *cache.Compile(ConstraintCache::Kind::kRegex, "[abc]{6,20}(12)?");
  options.end_tokens = {0};
  options.logprobs = DrawLogprobs::kSampling;
  options.top_logprobs = 3;
  RequestSampler sampler(options, 8, std::vector<int32_t>{1, 2, 3, 4});
  const std::vector<float> logits = {3.0f, 1.0f, 2.0f, 0.0f, 1.5f, 2.5f, 4.0f, 0.5f};
  SamplingParams params;
  params.temperature = 1.0f;
  params.seed = 4;
  const std::vector<int32_t> end = {0};
  std::shared_ptr<const TokenMask> allowed;
  for (uint64_t position = 0; position < 40; ++position) {
    params.banned = position < 12 ? absl::MakeConstSpan(end) : absl::Span<const int32_t>();
    TokenDraw draw;
    ASSERT_TRUE(sampler.Describe(params, &draw));
    const SampledToken sampled = sampler.Sample(logits, params, position);
    ASSERT_EQ(sampled.token, LiteralDraw(draw, logits).Make(params, position));
    ASSERT_TRUE(SameDraw(sampled, DrawToken(draw, logits, params, position)));
    TokenDraw again;
    ASSERT_TRUE(sampler.Describe(params, &again));
    EXPECT_EQ(again.constraint, draw.constraint);
    if (allowed == nullptr) allowed = draw.allowed;
    EXPECT_EQ(draw.allowed, allowed);
    if (sampled.token <= 0) {
      EXPECT_TRUE(draw.may_end);
      return;
    }
    sampler.Append(sampled.token);
  }
  FAIL() << "it never ended";
}

}  // namespace
}  // namespace mmfree
