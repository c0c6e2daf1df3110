// Lists of distinct items, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_DISTINCT_ITEMS_H_
#define MMFREE_SERVER_SAMPLING_DISTINCT_ITEMS_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "server/sampling/grammar.h"

namespace mmfree {

// Items to choose from; the grammar has a rule for each of them and each number of those before.
inline constexpr size_t kMaxDistinctItems = 64;

// `min` to `max` (-1: any number) of `items`, at most kMaxDistinctItems, each once at most and in
// their order, with `separator` between them. Nullopt when there are fewer than `min`.
std::optional<Grammar::Sequence> DistinctItems(const std::vector<Grammar::Sequence>& items,
                                               const Grammar::Sequence& separator, int64_t min,
                                               int64_t max, Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_DISTINCT_ITEMS_H_
