#include "tests/bench/read_bandwidth.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace mmfree {
namespace {

constexpr int64_t kCacheMultiple = 4;
constexpr int64_t kMinBytes = int64_t{64} << 20;

int64_t BufferBytes(int64_t weight_bytes) {
  const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  return std::max({weight_bytes, kCacheMultiple * cache, kMinBytes});
}

// Independent sums of a cache line's words: as wide as the target's vectors are. (What picks a
// clone runs before ThreadSanitizer is ready.)
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t
Sum(const uint64_t* words, size_t count) {
  constexpr size_t kLanes = 32;
  uint64_t lanes[kLanes] = {};
  for (size_t i = 0; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += words[i + lane];
  }
  uint64_t sum = 0;
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace

ReadBandwidth::ReadBandwidth(int64_t weight_bytes, cpu::ThreadPool* pool)
    : pool_(pool),
      words_(static_cast<size_t>(BufferBytes(weight_bytes)) / sizeof(uint64_t)),
      buffer_(std::make_unique_for_overwrite<uint64_t[]>(words_)),
      sums_(static_cast<size_t>(pool->size()) * 8) {
  pool_->Run([this](int thread) {
    const auto [begin, end] = Part(thread);
    std::fill(buffer_.get() + begin, buffer_.get() + end, 1);
  });
}

std::pair<size_t, size_t> ReadBandwidth::Part(int thread) const {
  const size_t threads = static_cast<size_t>(pool_->size());
  const size_t index = static_cast<size_t>(thread);
  return {words_ * index / threads, words_ * (index + 1) / threads};
}

double ReadBandwidth::Measure() {
  const auto start = std::chrono::steady_clock::now();
  pool_->Run([this](int thread) {
    const auto [begin, end] = Part(thread);
    sums_[static_cast<size_t>(thread) * 8] += Sum(buffer_.get() + begin, end - begin);
  });
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return static_cast<double>(bytes()) / time.count();
}

}  // namespace mmfree
