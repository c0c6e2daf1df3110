#include "server/sessions/host_cache.h"

#include <string>

#include "gtest/gtest.h"

namespace mmfree {
namespace {

SharedBytes Bytes(size_t size) { return std::make_shared<const std::string>(size, 'x'); }

TEST(HostCache, LeastRecentlyUsedGoFirstWithinTheBudget) {
  HostCache cache(3 * (1000 + 128));
  for (uint64_t revision = 1; revision <= 3; ++revision) cache.Put(revision, Bytes(1000));
  EXPECT_NE(cache.Get(1), nullptr);
  cache.Put(4, Bytes(1000));
  EXPECT_TRUE(cache.Contains(1));
  EXPECT_FALSE(cache.Contains(2));
  EXPECT_TRUE(cache.Contains(3));
  EXPECT_TRUE(cache.Contains(4));
  EXPECT_EQ(cache.bytes(), 3 * (1000 + 128));
}

TEST(HostCache, CountsToZero) {
  HostCache cache(1 << 20);
  for (uint64_t revision = 1; revision <= 9; ++revision) cache.Put(revision, Bytes(100 * revision));
  cache.Put(3, Bytes(7));
  for (uint64_t revision = 0; revision <= 9; ++revision) cache.Erase(revision);
  EXPECT_EQ(cache.bytes(), 0);
}

TEST(HostCache, WithoutABudgetKeepsNothing) {
  HostCache cache(0);
  cache.Put(1, Bytes(1));
  EXPECT_EQ(cache.Get(1), nullptr);
  EXPECT_EQ(cache.bytes(), 0);
}

}  // namespace
}  // namespace mmfree
