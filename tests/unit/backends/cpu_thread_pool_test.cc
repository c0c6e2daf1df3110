#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "gtest/gtest.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/backends/cpu/topology.h"

namespace mmfree::cpu {
namespace {

TEST(ThreadPoolTest, EachThreadRunsItsPartOfEveryTask) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(ThreadHomes({AllowedProcessors()}, threads, /*pin=*/threads % 2 == 0));
    ASSERT_EQ(pool.size(), threads);
    std::vector<int> calls(static_cast<size_t>(threads));
    for (int run = 0; run < 200; ++run) {
      pool.Run([&](int thread) { ++calls[static_cast<size_t>(thread)]; });
    }
    EXPECT_EQ(calls, std::vector<int>(static_cast<size_t>(threads), 200));
  }
}

TEST(ThreadPoolTest, NothingPassesABarrierBeforeAllHaveReachedIt) {
  for (int threads : {2, 3, 5}) {
    ThreadPool pool(threads);
    constexpr int kRounds = 500;
    // Not atomic: the barrier orders the writes before the reads.
    std::vector<int> round_of(static_cast<size_t>(threads));
    std::atomic<int> wrong = 0;
    pool.Run([&](int thread) {
      for (int round = 1; round <= kRounds; ++round) {
        round_of[static_cast<size_t>(thread)] = round;
        pool.Barrier(thread);
        for (int seen : round_of) wrong += seen != round;
        pool.Barrier(thread);
      }
    });
    EXPECT_EQ(wrong, 0);
  }
}

TEST(ThreadPoolTest, RunReturnsAfterEveryPart) {
  ThreadPool pool(4);
  for (int run = 0; run < 500; ++run) {
    std::vector<int> done(4);
    pool.Run([&](int thread) { done[static_cast<size_t>(thread)] = 1; });
    EXPECT_EQ(done, std::vector<int>(4, 1));
  }
}

TEST(ThreadPoolTest, ThreadsKeepToTheirHomesAndTheCallerOnlyWithinATask) {
  const Processors allowed = AllowedProcessors();
  ASSERT_FALSE(allowed.empty());
  const std::vector<Processors> homes = {{allowed.back()}, {allowed.front()}, {}};
  ThreadPool pool(homes);
  std::vector<Processors> seen(3);
  pool.Run([&](int thread) { seen[static_cast<size_t>(thread)] = AllowedProcessors(); });
  EXPECT_EQ(seen[0], homes[0]);
  EXPECT_EQ(seen[1], homes[1]);
  EXPECT_EQ(seen[2], allowed);
  EXPECT_EQ(AllowedProcessors(), allowed);
}

void BindThisThread(const Processors& processors) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int processor : processors) CPU_SET(processor, &set);
  ASSERT_EQ(sched_setaffinity(0, sizeof(set), &set), 0);
}

TEST(ThreadPoolTest, ThreadsStayWhereOthersHaveBoundThemSince) {
  const Processors allowed = AllowedProcessors();
  if (allowed.size() < 2) GTEST_SKIP() << "needs two processors";
  const Processors one = {allowed.front()};
  ThreadPool pool(2);
  Processors seen;
  // As `taskset -ap` does; the worker then has the caller's processor and would like a free one.
  pool.Run([&](int) { BindThisThread(one); });
  for (int run = 0; run < 10; ++run) {
    pool.Run([&](int thread) {
      if (thread == 1) seen = AllowedProcessors();
    });
    EXPECT_EQ(seen, one);
  }
  BindThisThread(allowed);
}

double ProcessSeconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// Spinning, each wait would take 50 us of the processor that the other thread needs.
TEST(ThreadPoolTest, ThreadsOnOneProcessorYieldToEachOther) {
  constexpr int kBarriers = 100;
  constexpr double kLimit = kBarriers * 25e-6;
  const Processors one = {AllowedProcessors().front()};
  ThreadPool pool({one, one});
  double least = kBarriers;
  for (int attempt = 0; attempt < 5 && least > kLimit; ++attempt) {
    const double before = ProcessSeconds();
    pool.Run([&](int thread) {
      for (int i = 0; i < kBarriers; ++i) pool.Barrier(thread);
    });
    least = std::min(least, ProcessSeconds() - before);
  }
  EXPECT_LT(least, kLimit);
}

TEST(ThreadPoolTest, AnUnusedPoolStops) { ThreadPool pool(4); }

}  // namespace
}  // namespace mmfree::cpu
