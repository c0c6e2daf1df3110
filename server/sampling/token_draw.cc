#include "server/sampling/token_draw.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <vector>

#include "server/base/philox.h"
#include "server/sampling/weights.h"

namespace mmfree {
namespace {

constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

// A thread's memory between calls. The threads that sample are few and live long.
struct Scratch {
  std::vector<float> logits;      // after masks, bias and penalties
  std::vector<uint64_t> weights;  // of these, by id; 0: cannot be drawn
  std::vector<Candidate> candidates;
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

// The candidates that filters narrow: everything that has a weight.
void GatherCandidates(Scratch* scratch) {
  scratch->candidates.clear();
  for (size_t id = 0; id < scratch->weights.size(); ++id) {
    const uint64_t weight = scratch->weights[id];
    if (weight == 0) continue;
    scratch->candidates.push_back({static_cast<int32_t>(id), scratch->logits[id], weight});
  }
}

// Leaves weights to the candidates only; returns their sum.
uint64_t ScatterCandidates(Scratch* scratch) {
  std::fill(scratch->weights.begin(), scratch->weights.end(), 0);
  uint64_t total = 0;
  for (const Candidate& candidate : scratch->candidates) {
    scratch->weights[candidate.id] = candidate.weight;
    total += candidate.weight;
  }
  return total;
}

// The lowest id whose running sum of weights exceeds `draw`, which is below their sum.
int32_t Invert(absl::Span<const uint64_t> weights, uint64_t draw) {
  constexpr size_t kBlock = 256;
  uint64_t sum = 0;
  for (size_t first = 0; first < weights.size(); first += kBlock) {
    const absl::Span<const uint64_t> block = weights.subspan(first, kBlock);
    uint64_t weight = 0;
    for (const uint64_t w : block) weight += w;
    if (sum + weight <= draw) {
      sum += weight;
      continue;
    }
    for (size_t i = 0; i < block.size(); ++i) {
      sum += block[i];
      if (sum > draw) return static_cast<int32_t>(first + i);
    }
  }
  return static_cast<int32_t>(weights.size()) - 1;
}

// The `count` ids that come first by `before`, a strict order of ids.
template <typename Before>
std::vector<int32_t> FirstIds(std::vector<int32_t> ids, size_t count, Before before) {
  count = std::min(count, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(count), ids.end(), before);
  ids.resize(count);
  return ids;
}

// Of the model's own distribution. NaN logits count as the least likely.
class ModelDistribution {
 public:
  ModelDistribution(absl::Span<const float> logits, Scratch* scratch) : logits_(logits) {
    max_logit_ = logits[ArgMax(logits)];
    total_ = LogitWeights(logits, max_logit_, 1.0f, absl::MakeSpan(scratch->weights));
  }

  float Logprob(int32_t id) const { return LogProbability(logits_[id], max_logit_, total_); }

  std::vector<int32_t> Likeliest(size_t count) const {
    std::vector<int32_t> ids(logits_.size());
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    return FirstIds(std::move(ids), count, [this](int32_t a, int32_t b) {
      const float of_a = Comparable(a);
      const float of_b = Comparable(b);
      return of_a != of_b ? of_a > of_b : a < b;
    });
  }

 private:
  float Comparable(int32_t id) const {
    return std::isnan(logits_[id]) ? -std::numeric_limits<float>::infinity() : logits_[id];
  }

  const absl::Span<const float> logits_;
  float max_logit_;
  uint64_t total_;
};

}  // namespace

TokenMask ChoicesOf(const TokenDraw& draw, int64_t vocab_size) {
  if (draw.nothing) return TokenMask(vocab_size, false);
  TokenMask choices = draw.allowed != nullptr ? *draw.allowed : TokenMask(vocab_size, true);
  if (draw.constraint != nullptr) choices.Intersect(*draw.constraint);
  for (const int32_t id : draw.ends) {
    if (draw.may_end && (draw.allowed == nullptr || draw.allowed->Has(id))) {
      choices.Add(id);
    } else {
      choices.Remove(id);
    }
  }
  for (const int32_t id : draw.banned) choices.Remove(id);
  return choices;
}

SampledToken DrawToken(const TokenDraw& draw, absl::Span<const float> logits,
                       const SamplingParams& params, uint64_t position) {
  const TokenMask choices = ChoicesOf(draw, static_cast<int64_t>(logits.size()));
  const int32_t first_choice = choices.First();
  SampledToken result;
  if (first_choice < 0) return result;

  Scratch& scratch = ThreadScratch();
  scratch.weights.resize(logits.size());
  const size_t top = static_cast<size_t>(draw.top_logprobs);
  std::vector<TokenAlternative> alternatives;
  const auto model = draw.logprobs == DrawLogprobs::kModel
                         ? std::optional<ModelDistribution>(std::in_place, logits, &scratch)
                         : std::nullopt;
  if (model.has_value() && top > 0) {
    for (const int32_t id : model->Likeliest(top)) alternatives.push_back({id, model->Logprob(id)});
  }

  scratch.logits.assign(logits.begin(), logits.end());
  choices.ForEachMissing([&scratch](int32_t id) { scratch.logits[id] = kNotANumber; });
  for (const auto& [id, bias] : draw.bias) scratch.logits[id] += bias;
  ApplyPenalties(draw.penalties, draw.window, draw.emitted, absl::MakeSpan(scratch.logits));

  result.token = ArgMax(scratch.logits);
  const float max_logit = scratch.logits[result.token];
  if (std::isnan(max_logit)) result.token = first_choice;
  uint64_t total = 0;
  if (params.temperature > 0.0f) {
    const float inverse = 1.0f / params.temperature;
    total = LogitWeights(scratch.logits, max_logit, inverse, absl::MakeSpan(scratch.weights));
    if (total > 0 && draw.filters.any()) {
      GatherCandidates(&scratch);
      ApplyFilters(draw.filters, max_logit, inverse, &scratch.candidates);
      total = ScatterCandidates(&scratch);
    }
    if (total > 0) {
      const uint64_t bits = UniformBits(params.seed, position, params.candidate, 0);
      result.token = Invert(scratch.weights, MulHigh64(bits, total));
    }
  }

  if (model.has_value()) {
    result.logprob = model->Logprob(result.token);
  } else if (draw.logprobs == DrawLogprobs::kSampling && total > 0) {
    const std::vector<uint64_t>& weights = scratch.weights;
    result.logprob = LogShare(weights[result.token], total);
    if (top > 0) {
      std::vector<int32_t> ids;
      for (size_t i = 0; i < weights.size(); ++i) {
        if (weights[i] > 0) ids.push_back(static_cast<int32_t>(i));
      }
      ids = FirstIds(std::move(ids), top, [&weights](int32_t a, int32_t b) {
        return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
      });
      for (const int32_t id : ids) alternatives.push_back({id, LogShare(weights[id], total)});
    }
  } else if (draw.logprobs == DrawLogprobs::kSampling && top > 0) {
    alternatives.push_back({result.token, 0.0f});  // the only token that could be drawn
  }
  if (top > 0) {
    result.top = std::make_shared<const std::vector<TokenAlternative>>(std::move(alternatives));
  }
  return result;
}

}  // namespace mmfree
