#include "server/sampling/filters.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace mmfree {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr int kShareBits = 40;
// Binary places of an information content: at most 87 * 2^24.
constexpr float kInformationOne = 16777216.0f;

using Candidates = std::vector<Candidate>;

bool Likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

uint64_t Sum(Candidates::const_iterator begin, Candidates::const_iterator end) {
  uint64_t sum = 0;
  for (; begin != end; ++begin) sum += begin->weight;
  return sum;
}

// Keeps the shortest prefix in the order `before` whose weights sum to `target` or more, one
// candidate at least. Linear on average; the result does not depend on how it divides.
template <typename Before>
void KeepPrefix(uint64_t target, Before before, Candidates* candidates) {
  auto begin = candidates->begin();
  auto end = candidates->end();
  // What is before `begin` stays; the prefix ends after one or more of [begin, end).
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    const uint64_t left = Sum(begin, middle);
    if (left >= target) {
      end = middle;
    } else {
      target -= left;
      begin = middle;
    }
  }
  candidates->erase(end, candidates->end());
}

void KeepTopK(uint32_t k, Candidates* candidates) {
  if (candidates->size() <= k) return;
  std::nth_element(candidates->begin(), candidates->begin() + k, candidates->end(), Likelier);
  candidates->resize(k);
}

void KeepTypical(float share, float max_logit, float inverse_temperature, Candidates* candidates) {
  // The information of a token is log(total) - x; log(total) cancels in its distance to the mean.
  const auto information = [&](const Candidate& c) {
    return static_cast<uint64_t>((max_logit - c.logit) * inverse_temperature * kInformationOne);
  };
  Wide moment = 0;
  uint64_t total = 0;
  for (const Candidate& c : *candidates) {
    moment += static_cast<Wide>(c.weight) * information(c);
    total += c.weight;
  }
  const uint64_t mean = static_cast<uint64_t>(moment / total);
  const auto distance = [&](const Candidate& c) {
    const uint64_t i = information(c);
    return i > mean ? i - mean : mean - i;
  };
  KeepPrefix(
      ShareOf(share, total),
      [&](const Candidate& a, const Candidate& b) {
        const uint64_t from_a = distance(a);
        const uint64_t from_b = distance(b);
        return from_a != from_b ? from_a < from_b : a.id < b.id;
      },
      candidates);
}

void KeepAtLeast(float share, Candidates* candidates) {
  uint64_t largest = 0;
  for (const Candidate& c : *candidates) largest = std::max(largest, c.weight);
  const uint64_t least = ShareOf(share, largest);
  candidates->erase(std::remove_if(candidates->begin(), candidates->end(),
                                   [least](const Candidate& c) { return c.weight < least; }),
                    candidates->end());
}

}  // namespace

uint64_t ShareOf(float share, uint64_t total) {
  // Exact in a double: a float times a power of two.
  const auto fixed = static_cast<uint64_t>(std::ldexp(static_cast<double>(share), kShareBits));
  constexpr Wide kRoundUp = (Wide{1} << kShareBits) - 1;
  return static_cast<uint64_t>((static_cast<Wide>(fixed) * total + kRoundUp) >> kShareBits);
}

void ApplyFilters(const FilterOptions& options, float max_logit, float inverse_temperature,
                  std::vector<Candidate>* candidates) {
  if (options.top_k > 0) KeepTopK(options.top_k, candidates);
  if (options.typical_p < 1.0f) {
    KeepTypical(options.typical_p, max_logit, inverse_temperature, candidates);
  }
  if (options.top_p < 1.0f) {
    KeepPrefix(ShareOf(options.top_p, Sum(candidates->begin(), candidates->end())), Likelier,
               candidates);
  }
  if (options.min_p > 0.0f) KeepAtLeast(options.min_p, candidates);
}

}  // namespace mmfree
