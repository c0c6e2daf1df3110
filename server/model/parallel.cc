#include "server/model/parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace mmfree {

void ParallelFor(int64_t count, int threads, absl::FunctionRef<void(int64_t)> task,
                 absl::FunctionRef<void()> after_own) {
  if (threads <= 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(count, 1)));
  std::atomic<int64_t> next{0};
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) {
      helpers.emplace_back([&] {
        for (int64_t i = next++; i < count; i = next++) task(i);
      });
    }
  } catch (const std::system_error&) {
    // The system starts no more: those there are do it all.
  }
  for (int64_t i = next++; i < count; i = next++) {
    task(i);
    after_own();
  }
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace mmfree
