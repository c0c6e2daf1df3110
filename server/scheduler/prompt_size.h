// How long prompts are, roughly: shorter ones have their turn first, equals in order of arrival.
#ifndef MMFREE_SERVER_SCHEDULER_PROMPT_SIZE_H_
#define MMFREE_SERVER_SCHEDULER_PROMPT_SIZE_H_

#include <algorithm>
#include <cstdint>

namespace mmfree {

inline constexpr int kNumPromptSizes = 6;

// Of a prompt of which `tokens` are left to be fed, in chunks of `full_chunk` at most: 0 for one
// chunk, 1 up to 4 chunks, 2 up to 16, and so on; kNumPromptSizes - 1 for all that is longer.
inline int PromptSize(int64_t tokens, int64_t full_chunk) {
  int size = 0;
  for (int64_t most = std::max<int64_t>(full_chunk, 1); tokens > most && size < kNumPromptSizes - 1;
       most *= 4) {
    ++size;
  }
  return size;
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_PROMPT_SIZE_H_
