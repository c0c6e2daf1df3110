// What plain reads of memory reach, as the limit that a decode step is held against.
#ifndef MMFREE_TESTS_BENCH_READ_BANDWIDTH_H_
#define MMFREE_TESTS_BENCH_READ_BANDWIDTH_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "server/backends/cpu/thread_pool.h"

namespace mmfree {

// A buffer that is read from end to end by all threads of a pool, each its own contiguous part, as
// a step reads the weights.
class ReadBandwidth {
 public:
  // The buffer is as large as the weights but at least several times the last-level cache.
  ReadBandwidth(int64_t weight_bytes, cpu::ThreadPool* pool);

  int64_t bytes() const { return static_cast<int64_t>(words_ * sizeof(uint64_t)); }
  // Reads the buffer once; bytes per second.
  double Measure();

 private:
  // The thread's words of the buffer, [begin, end). It writes them first, too, which places them in
  // its memory node.
  std::pair<size_t, size_t> Part(int thread) const;

  cpu::ThreadPool* const pool_;
  const size_t words_;
  const std::unique_ptr<uint64_t[]> buffer_;  // [words_]
  std::vector<uint64_t> sums_;                // keep the reads alive
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_READ_BANDWIDTH_H_
