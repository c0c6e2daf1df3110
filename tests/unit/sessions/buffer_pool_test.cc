#include "server/sessions/buffer_pool.h"

#include <set>
#include <thread>

#include "gtest/gtest.h"

namespace mmfree {
namespace {

TEST(BufferPool, GivesBackWhatWasFreedWhenItFits) {
  BufferPool pool;
  const std::string* const first = pool.Take(10'000).get();
  const std::shared_ptr<std::string> again = pool.Take(10'100);
  EXPECT_EQ(again.get(), first);
  EXPECT_TRUE(again->empty());
  EXPECT_GE(again->capacity(), 10'100u);
  EXPECT_NE(pool.Take(10'000).get(), first) << "it is in use";
}

TEST(BufferPool, DoesNotSpendLargeBuffersOnSmallOnes) {
  BufferPool pool;
  pool.Take(100'000).reset();
  EXPECT_LT(pool.Take(1'000)->capacity(), 10'000u);
  EXPECT_GE(pool.Take(200'000)->capacity(), 200'000u);
}

TEST(BufferPool, KeepsFewAndTheLatest) {
  BufferPool pool;
  std::set<const std::string*> old;
  for (const size_t size : {5'000, 50'000}) {
    std::vector<std::shared_ptr<std::string>> buffers;
    for (size_t i = 0; i < 2 * BufferPool::kMaxFree; ++i) buffers.push_back(pool.Take(size));
    if (size == 50'000) {
      for (const auto& buffer : buffers) old.insert(buffer.get());
    }
  }
  std::vector<std::shared_ptr<std::string>> taken;
  for (size_t i = 0; i < BufferPool::kMaxFree; ++i) taken.push_back(pool.Take(50'000));
  for (const auto& buffer : taken) EXPECT_TRUE(old.contains(buffer.get()));
}

TEST(BufferPool, BuffersMayOutliveItOnOtherThreads) {
  auto pool = std::make_unique<BufferPool>();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    std::vector<std::shared_ptr<std::string>> buffers;
    for (int i = 0; i < 50; ++i) buffers.push_back(pool->Take(3'000));
    threads.emplace_back([buffers = std::move(buffers)]() mutable {
      for (auto& buffer : buffers) buffer->assign(3'000, 'x');
      buffers.clear();
    });
  }
  pool.reset();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace mmfree
