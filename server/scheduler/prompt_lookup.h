// Guesses what comes next from what came before: text repeats itself.
#ifndef MMFREE_SERVER_SCHEDULER_PROMPT_LOOKUP_H_
#define MMFREE_SERVER_SCHEDULER_PROMPT_LOOKUP_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace mmfree {

// Tokens of a context that are looked back over: a look-up takes a microsecond or two.
inline constexpr size_t kLookupWindow = 4096;

// Up to `count` tokens that may follow `context`: those that followed the latest of the longest
// earlier occurrences of its end, which is at least two tokens. What overlaps the end repeats, as
// in "a b a b". Empty when there is no such occurrence.
std::vector<int32_t> LookUpContinuation(absl::Span<const int32_t> context, size_t count);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_PROMPT_LOOKUP_H_
