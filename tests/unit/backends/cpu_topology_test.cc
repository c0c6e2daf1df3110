// Processors, memory nodes and threads' places among them, with made-up nodes.
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gtest/gtest.h"
#include "server/backends/cpu/topology.h"
#include "tests/support/temp_directory.h"

namespace mmfree::cpu {
namespace {

class TopologyTest : public testing::Test {
 protected:
  // A file under the root, and the folders above it.
  std::string Write(absl::string_view name, absl::string_view text) const {
    const std::string file = root_.File(name);
    std::filesystem::create_directories(std::filesystem::path(file).parent_path());
    WriteFile(file, absl::StrCat(text, "\n"));
    return file;
  }
  // A folder as the system's, of nodes with these processor lists.
  std::string FakeNodes(const std::string& name, const std::string& online,
                        const std::vector<std::string>& lists) const {
    Write(name + "/online", online);
    for (size_t n = 0; n < lists.size(); ++n) {
      Write(absl::StrCat(name, "/node", n, "/cpulist"), lists[n]);
    }
    return root_.File(name);
  }
  // A folder as the system's, of processors with these siblings.
  std::string FakeProcessors(const std::string& name,
                             const std::vector<std::string>& siblings) const {
    for (size_t n = 0; n < siblings.size(); ++n) {
      Write(absl::StrCat(name, "/cpu", n, "/topology/thread_siblings_list"), siblings[n]);
    }
    return root_.File(name);
  }
  // Where each processor is a core of its own.
  std::string none() const { return root_.File("none"); }

  const TempDirectory root_;
};

TEST_F(TopologyTest, ThereIsACore) {
  EXPECT_GE(AvailablePhysicalCores(), 1);
  EXPECT_FALSE(AllowedProcessors().empty());
}

TEST_F(TopologyTest, TheQuotaIsTheLeastOfTheProcessesControlGroups) {
  const auto quota = [this](absl::string_view groups, absl::string_view membership) {
    return ProcessorQuota(root_.File(groups), Write("self", membership));
  };
  Write("v2/a/cpu.max", "250000 100000");
  Write("v2/a/b/cpu.max", "max 100000");
  Write("v2/c/cpu.max", "50000 100000");
  EXPECT_EQ(quota("v2", "0::/a/b"), 2.5);
  EXPECT_EQ(quota("v2", "0::/c"), 0.5);
  EXPECT_TRUE(std::isinf(quota("v2", "0::/")));
  EXPECT_TRUE(std::isinf(ProcessorQuota(root_.File("v2"), none())));

  Write("v1/cpu/cpu.cfs_quota_us", "-1");
  Write("v1/cpu/cpu.cfs_period_us", "100000");
  Write("v1/cpu/a/cpu.cfs_quota_us", "300000");
  Write("v1/cpu/a/cpu.cfs_period_us", "100000");
  EXPECT_EQ(quota("v1", "2:cpu,cpuacct:/a\n1:memory:/c\n0::/gone"), 3);
  EXPECT_TRUE(std::isinf(quota("v1", "2:cpu,cpuacct:/\n1:cpuset:/a")));

  // A container without a name space of groups: the path is the host's, the root is its own.
  Write("container/cpu.max", "150000 100000");
  EXPECT_EQ(quota("container", "0::/docker/1234"), 1.5);
}

TEST_F(TopologyTest, ReadsTheKernelsListsAndRefusesOthers) {
  Processors list;
  EXPECT_TRUE(ParseProcessorList("0-3,8,10-11\n", &list));
  EXPECT_EQ(list, (Processors{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_TRUE(ParseProcessorList("\n", &list));
  EXPECT_TRUE(list.empty());
  for (const char* text : {"x", "1-", "-1", "3-2", "1,,2", "1-2-3", "0-2000000000"}) {
    EXPECT_FALSE(ParseProcessorList(text, &list)) << text;
  }
}

TEST_F(TopologyTest, NodesAreThoseThatHaveAllowedProcessors) {
  const std::string directory = FakeNodes("nodes", "0-2", {"0-3,8-11", "4-7,12-15", ""});
  EXPECT_EQ(NumaNodes({0, 1, 5, 9, 12}, directory), (std::vector<Processors>{{0, 1, 9}, {5, 12}}));
  EXPECT_EQ(NumaNodes({4, 5}, directory), (std::vector<Processors>{{4, 5}}));
}

TEST_F(TopologyTest, NodesThatDoNotTellOfEveryProcessorAreOne) {
  const Processors allowed = {0, 1, 4};
  EXPECT_EQ(NumaNodes(allowed, FakeNodes("partial", "0-1", {"0-1"})),
            (std::vector<Processors>{allowed}));
  EXPECT_EQ(NumaNodes(allowed, none()), (std::vector<Processors>{allowed}));
}

TEST_F(TopologyTest, PinnedThreadsShareNoCoreWhileThereAreOthers) {
  const std::string pairs = FakeProcessors("pairs", {"0-1", "0-1", "2-3", "2-3", "4-5", "4-5"});
  EXPECT_EQ(CoresFirst({0, 1, 2, 3, 4, 5}, pairs), (Processors{0, 2, 4, 1, 3, 5}));
  EXPECT_EQ(CoresFirst({1, 2, 3, 9}, pairs), (Processors{1, 2, 9, 3}));
  EXPECT_EQ(ThreadHomes({{0, 1, 2, 3}, {4, 5}}, 3, true, pairs),
            (std::vector<Processors>{{0}, {2}, {4}}));
  EXPECT_EQ(ThreadHomes({{0, 1, 2, 3}}, 4, true, pairs),
            (std::vector<Processors>{{0}, {2}, {1}, {3}}));
}

TEST_F(TopologyTest, ThreadsAreSharedOutByTheNodesProcessors) {
  const std::vector<Processors> nodes = {{0, 1, 2, 3}, {4, 5}};
  EXPECT_EQ(ThreadHomes(nodes, 3, false, none()),
            (std::vector<Processors>{nodes[0], nodes[0], nodes[1]}));
  EXPECT_EQ(ThreadHomes(nodes, 6, true, none()),
            (std::vector<Processors>{{0}, {1}, {2}, {3}, {4}, {5}}));
  for (int threads = 1; threads <= 20; ++threads) {
    for (const Processors& home : ThreadHomes(nodes, threads, threads % 2 == 0)) {
      EXPECT_FALSE(home.empty()) << threads;
    }
  }
}

TEST_F(TopologyTest, ThreadsOfASingleNodeRunAnywhereUnlessPinned) {
  EXPECT_EQ(ThreadHomes({{2, 3}}, 3, false), std::vector<Processors>(3));
  EXPECT_EQ(ThreadHomes({{2, 3}}, 3, true, none()), (std::vector<Processors>{{2}, {3}, {2}}));
}

TEST_F(TopologyTest, AThreadMovesOnlyFromAnothersProcessorToAFreeOne) {
  const Processors home = {0, 1, 2, 3};
  EXPECT_EQ(FreeProcessor({0, 1, 2}, 2, home), -1);
  EXPECT_EQ(FreeProcessor({0, 0, 1}, 1, home), 2);
  EXPECT_EQ(FreeProcessor({0, 0, 1}, 0, home), -1);  // the other one moves
  EXPECT_EQ(FreeProcessor({0, 0}, 1, {0}), -1);
  EXPECT_EQ(FreeProcessor({0, -1, 0}, 2, {0, 1}), 1);  // a thread that has not run yet
}

}  // namespace
}  // namespace mmfree::cpu
