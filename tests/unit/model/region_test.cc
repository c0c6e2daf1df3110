#include "server/model/region.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "server/model/parallel.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using testing::HasSubstr;

TEST(RegionTest, MapsAFileAndKeepsItAcrossMovesAndReplacement) {
  const TempDirectory directory;
  const std::string path = directory.File("data");
  WriteFile(path, "hello");
  absl::StatusOr<Region> mapped = Region::MapFile(path);
  ASSERT_THAT(mapped, IsOk());
  Region region = *std::move(mapped);
  WriteFile(directory.File("new"), "other");
  std::filesystem::rename(directory.File("new"), path);
  EXPECT_EQ(std::string(region.bytes().begin(), region.bytes().end()), "hello");
  EXPECT_EQ(region.mutable_data(), nullptr);
}

TEST(RegionTest, AnEmptyFileIsAnEmptySpan) {
  const TempDirectory directory;
  WriteFile(directory.File("empty"), "");
  const absl::StatusOr<Region> region = Region::MapFile(directory.File("empty"));
  ASSERT_THAT(region, IsOk());
  EXPECT_TRUE(region->bytes().empty());
}

TEST(RegionTest, RefusesWhatIsNotARegularFile) {
  const TempDirectory directory;
  EXPECT_THAT(Region::MapFile(directory.File("absent")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("absent")));
  EXPECT_THAT(Region::MapFile(directory.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a regular file")));
  ASSERT_EQ(mkfifo(directory.File("pipe").c_str(), 0600), 0);
  EXPECT_THAT(Region::MapFile(directory.File("pipe")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a regular file")));
}

TEST(RegionTest, AllocatedMemoryIsZeroAlignedAndWritableToTheLastByte) {
  absl::StatusOr<Region> region = Region::Allocate(3000001);
  ASSERT_THAT(region, IsOk());
  uint8_t* const data = region->mutable_data();
  ASSERT_NE(data, nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 4096, 0u);
  EXPECT_EQ(data[0] | data[3000000], 0);
  data[3000000] = 1;
  EXPECT_THAT(Region::Allocate(int64_t{1} << 60),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("cannot allocate")));
}

// In a process of its own, of a user who may start no thread more: root's is not limited. The
// number of tasks that ran of 100.
int TasksWithoutThreads() {
  const rlimit none = {1, 1};
  if (setrlimit(RLIMIT_NPROC, &none) != 0) return -1;
  if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) {
    fprintf(stderr, "not tested: there is no other user here\n");
    return 100;
  }
  std::atomic<int> calls{0};
  ParallelFor(100, 4, [&](int64_t) { ++calls; });
  return calls;
}

TEST(ParallelForTest, RunsAllTasksWhenTheSystemStartsNoMoreThreads) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(_exit(TasksWithoutThreads()), testing::ExitedWithCode(100), "");
}

TEST(ParallelForTest, RunsEachTaskOnceForAnyNumberOfThreads) {
  for (const int threads : {0, 1, 2, 5}) {
    for (const int64_t count : {0, 1, 3, 100}) {
      std::vector<std::atomic<int>> calls(count);
      ParallelFor(count, threads, [&](int64_t i) { ++calls[i]; });
      for (const std::atomic<int>& c : calls) EXPECT_EQ(c, 1);
    }
  }
}

}  // namespace
}  // namespace mmfree
