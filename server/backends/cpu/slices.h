// How the rows of a matrix, or the channels of a layer, are shared out among the threads.
#ifndef MMFREE_SERVER_BACKENDS_CPU_SLICES_H_
#define MMFREE_SERVER_BACKENDS_CPU_SLICES_H_

#include <algorithm>
#include <cstdint>

namespace mmfree::cpu {

struct Range {
  int64_t begin;
  int64_t end;
};

// The share of `thread` of `threads` in [0, n): whole cache lines of floats but for the end, and
// the threads' shares in order.
inline Range ThreadSlice(int64_t n, int thread, int threads) {
  constexpr int64_t kFloatsPerLine = 16;
  const int64_t lines = (n + kFloatsPerLine - 1) / kFloatsPerLine;
  return {std::min(n, lines * thread / threads * kFloatsPerLine),
          std::min(n, lines * (thread + 1) / threads * kFloatsPerLine)};
}

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_SLICES_H_
