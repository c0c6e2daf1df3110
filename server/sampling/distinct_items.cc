#include "server/sampling/distinct_items.h"

#include <algorithm>
#include <utility>

namespace mmfree {

std::optional<Grammar::Sequence> DistinctItems(const std::vector<Grammar::Sequence>& items,
                                               const Grammar::Sequence& separator, int64_t min,
                                               int64_t max, Grammar* grammar) {
  const auto count = static_cast<int64_t>(items.size());
  if (count < min) return std::nullopt;
  const int64_t most = max < 0 ? count : std::min(max, count);
  // after[n]: what may follow n items, when only those from `first` on are left to choose from.
  // Built from the last item; nullopt: nothing may.
  std::vector<std::optional<Grammar::Sequence>> after(static_cast<size_t>(most) + 1);
  for (int64_t n = min; n <= most; ++n) after[n] = Grammar::Sequence();
  for (int64_t first = count; first-- > 0;) {
    for (int64_t n = 0; n < most; ++n) {
      // Still the one of the items after `first`, since n rises.
      const std::optional<Grammar::Sequence>& with = after[n + 1];
      if (!with.has_value()) continue;
      Grammar::Sequence taken = n > 0 ? separator : Grammar::Sequence();
      taken.insert(taken.end(), items[first].begin(), items[first].end());
      taken.insert(taken.end(), with->begin(), with->end());
      const Grammar::Rule rule = grammar->AddRule();
      grammar->AddAlternative(rule, std::move(taken));
      if (after[n].has_value()) grammar->AddAlternative(rule, *after[n]);
      after[n] = Grammar::Sequence{rule};
    }
  }
  return after[0];
}

}  // namespace mmfree
