#include "server/scheduler/prompt_lookup.h"

#include <algorithm>

namespace mmfree {
namespace {

constexpr size_t kShortestMatch = 2;
// Longer ones are as good as this.
constexpr size_t kLongestMatch = 8;

// Tokens that the context's ends at `a` and `b` have in common, a < b.
size_t CommonEnd(absl::Span<const int32_t> context, size_t a, size_t b) {
  const size_t most = std::min(a, kLongestMatch);
  size_t common = 0;
  while (common < most && context[a - 1 - common] == context[b - 1 - common]) ++common;
  return common;
}

}  // namespace

std::vector<int32_t> LookUpContinuation(absl::Span<const int32_t> context, size_t count) {
  if (context.size() > kLookupWindow) context.remove_prefix(context.size() - kLookupWindow);
  size_t best = kShortestMatch - 1;
  size_t next = 0;  // what followed the best match; 0: none
  for (size_t end = context.size(); end-- > kShortestMatch && best < kLongestMatch;) {
    if (context[end - 1] != context.back()) continue;
    const size_t common = CommonEnd(context, end, context.size());
    if (common <= best) continue;
    best = common;
    next = end;
  }
  std::vector<int32_t> continuation;
  if (next == 0) return continuation;
  for (size_t i = next; continuation.size() < count; ++i) {
    continuation.push_back(i < context.size() ? context[i] : continuation[i - context.size()]);
  }
  return continuation;
}

}  // namespace mmfree
