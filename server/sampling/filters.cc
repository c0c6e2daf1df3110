#include "server/sampling/filters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "absl/base/casts.h"

namespace mmfree {
namespace {

__extension__ using Wide = unsigned __int128;

using Candidates = std::vector<Candidate>;

bool Likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Keeps the shortest prefix in the order `before` whose amounts sum to `target` or more, one
// candidate at least. Linear on average; the result does not depend on how it divides.
template <typename Before, typename Amount>
void CutPrefix(uint64_t target, Before before, Amount amount, Candidates* candidates) {
  auto begin = candidates->begin();
  auto end = candidates->end();
  // What is before `begin` stays; the prefix ends after one or more of [begin, end).
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    uint64_t left = 0;
    for (auto it = begin; it != middle; ++it) left += amount(*it);
    if (left >= target) {
      end = middle;
    } else {
      target -= left;
      begin = middle;
    }
  }
  candidates->erase(end, candidates->end());
}

// The same, for many: they are counted into bins that follow each other in the order, so that only
// the bin in which the prefix ends is looked at closely. `distance`, not negative, never falls
// along the order.
template <typename Before, typename Amount, typename Distance>
void KeepPrefix(uint64_t target, Before before, Amount amount, Distance distance,
                Candidates* candidates) {
  // Exponent and four binary places of a distance.
  constexpr int kShift = 19;
  constexpr size_t kBins = size_t{1} << (31 - kShift);
  constexpr size_t kFew = 512;
  if (candidates->size() <= kFew) {
    CutPrefix(target, before, amount, candidates);
    return;
  }
  const auto bin_of = [&distance](const Candidate& c) {
    return absl::bit_cast<uint32_t>(distance(c)) >> kShift;
  };
  target = std::max<uint64_t>(target, 1);  // one candidate at least
  std::array<uint64_t, kBins> amounts = {};
  for (const Candidate& c : *candidates) amounts[bin_of(c)] += amount(c);
  size_t last = 0;
  while (last + 1 < kBins && amounts[last] < target) target -= amounts[last++];
  Candidates edge;
  const auto beyond = [&](const Candidate& c) {
    const size_t bin = bin_of(c);
    if (bin == last) edge.push_back(c);
    return bin >= last;
  };
  candidates->erase(std::remove_if(candidates->begin(), candidates->end(), beyond),
                    candidates->end());
  if (!edge.empty()) CutPrefix(target, before, amount, &edge);
  candidates->insert(candidates->end(), edge.begin(), edge.end());
}

uint64_t WeightOf(const Candidate& c) { return c.weight; }

// How far a candidate is behind the likeliest.
struct Behind {
  float max_logit;
  // Zeros of either sign are no distance: the sum is not -0.
  float operator()(const Candidate& c) const { return (max_logit - c.logit) + 0.0f; }
};

void KeepTopK(uint32_t k, float max_logit, Candidates* candidates) {
  if (candidates->size() <= k) return;
  KeepPrefix(
      k, Likelier, [](const Candidate&) { return uint64_t{1}; }, Behind{max_logit}, candidates);
}

void KeepTypical(float share, float max_logit, float inverse_temperature, Candidates* candidates) {
  // The information of a token is log(total) - x; log(total) cancels in its distance to the mean.
  const auto information = [&](const Candidate& c) {
    return uint64_t{Information(c.logit, max_logit, inverse_temperature)};
  };
  Wide moment = 0;
  uint64_t total = 0;  // not 0: every candidate weighs something
  for (const Candidate& c : *candidates) {
    moment += static_cast<Wide>(c.weight) * information(c);
    total += c.weight;
  }
  const uint64_t mean = static_cast<uint64_t>(moment / std::max<uint64_t>(total, 1));
  const auto distance = [&](const Candidate& c) {
    const uint64_t i = information(c);
    return i > mean ? i - mean : mean - i;
  };
  KeepPrefix(
      ShareOf(FixedShare(share), total),
      [&](const Candidate& a, const Candidate& b) {
        const uint64_t from_a = distance(a);
        const uint64_t from_b = distance(b);
        return from_a != from_b ? from_a < from_b : a.id < b.id;
      },
      WeightOf, [&](const Candidate& c) { return static_cast<float>(distance(c)); }, candidates);
}

void KeepAtLeast(float share, Candidates* candidates) {
  uint64_t largest = 0;
  for (const Candidate& c : *candidates) largest = std::max(largest, c.weight);
  const uint64_t least = ShareOf(FixedShare(share), largest);
  candidates->erase(std::remove_if(candidates->begin(), candidates->end(),
                                   [least](const Candidate& c) { return c.weight < least; }),
                    candidates->end());
}

}  // namespace

uint64_t FixedShare(float share) {
  // Exact in a double: a float times a power of two.
  return static_cast<uint64_t>(std::ldexp(static_cast<double>(share), kShareBits));
}

void ApplyFilters(const FilterOptions& options, float max_logit, float inverse_temperature,
                  std::vector<Candidate>* candidates) {
  if (options.top_k > 0) KeepTopK(options.top_k, max_logit, candidates);
  if (options.typical_p < 1.0f) {
    KeepTypical(options.typical_p, max_logit, inverse_temperature, candidates);
  }
  if (options.top_p < 1.0f) {
    uint64_t total = 0;
    for (const Candidate& c : *candidates) total += c.weight;
    KeepPrefix(ShareOf(FixedShare(options.top_p), total), Likelier, WeightOf, Behind{max_logit},
               candidates);
  }
  if (options.min_p > 0.0f) KeepAtLeast(options.min_p, candidates);
}

}  // namespace mmfree
