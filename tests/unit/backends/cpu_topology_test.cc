// Processors, memory nodes and threads' places among them, with made-up nodes.
#include <sys/stat.h>

#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "server/backends/cpu/topology.h"

namespace mmfree::cpu {
namespace {

TEST(TopologyTest, ThereIsACore) {
  EXPECT_GE(AvailablePhysicalCores(), 1);
  EXPECT_FALSE(AllowedProcessors().empty());
}

TEST(TopologyTest, ReadsTheKernelsListsAndRefusesOthers) {
  Processors list;
  EXPECT_TRUE(ParseProcessorList("0-3,8,10-11\n", &list));
  EXPECT_EQ(list, (Processors{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_TRUE(ParseProcessorList("\n", &list));
  EXPECT_TRUE(list.empty());
  for (const char* text : {"x", "1-", "-1", "3-2", "1,,2", "1-2-3", "0-2000000000"}) {
    EXPECT_FALSE(ParseProcessorList(text, &list)) << text;
  }
}

// A folder as the system's, of nodes with these processor lists.
std::string FakeNodes(const std::string& name, const std::string& online,
                      const std::vector<std::string>& lists) {
  const std::string directory = absl::StrCat(testing::TempDir(), "/", name);
  mkdir(directory.c_str(), 0755);
  std::ofstream(directory + "/online") << online << "\n";
  for (size_t n = 0; n < lists.size(); ++n) {
    const std::string node = absl::StrCat(directory, "/node", n);
    mkdir(node.c_str(), 0755);
    std::ofstream(node + "/cpulist") << lists[n] << "\n";
  }
  return directory;
}

TEST(TopologyTest, NodesAreThoseThatHaveAllowedProcessors) {
  const std::string directory = FakeNodes("nodes", "0-2", {"0-3,8-11", "4-7,12-15", ""});
  EXPECT_EQ(NumaNodes({0, 1, 5, 9, 12}, directory), (std::vector<Processors>{{0, 1, 9}, {5, 12}}));
  EXPECT_EQ(NumaNodes({4, 5}, directory), (std::vector<Processors>{{4, 5}}));
}

TEST(TopologyTest, NodesThatDoNotTellOfEveryProcessorAreOne) {
  const Processors allowed = {0, 1, 4};
  EXPECT_EQ(NumaNodes(allowed, FakeNodes("partial", "0-1", {"0-1"})),
            (std::vector<Processors>{allowed}));
  EXPECT_EQ(NumaNodes(allowed, testing::TempDir() + "/none"), (std::vector<Processors>{allowed}));
}

// A folder as the system's, of processors with these siblings.
std::string FakeProcessors(const std::string& name, const std::vector<std::string>& siblings) {
  const std::string directory = absl::StrCat(testing::TempDir(), "/", name);
  mkdir(directory.c_str(), 0755);
  for (size_t n = 0; n < siblings.size(); ++n) {
    const std::string cpu = absl::StrCat(directory, "/cpu", n);
    mkdir(cpu.c_str(), 0755);
    mkdir((cpu + "/topology").c_str(), 0755);
    std::ofstream(cpu + "/topology/thread_siblings_list") << siblings[n] << "\n";
  }
  return directory;
}

TEST(TopologyTest, PinnedThreadsShareNoCoreWhileThereAreOthers) {
  const std::string pairs = FakeProcessors("pairs", {"0-1", "0-1", "2-3", "2-3", "4-5", "4-5"});
  EXPECT_EQ(CoresFirst({0, 1, 2, 3, 4, 5}, pairs), (Processors{0, 2, 4, 1, 3, 5}));
  EXPECT_EQ(CoresFirst({1, 2, 3, 9}, pairs), (Processors{1, 2, 9, 3}));
  EXPECT_EQ(ThreadHomes({{0, 1, 2, 3}, {4, 5}}, 3, true, pairs),
            (std::vector<Processors>{{0}, {2}, {4}}));
  EXPECT_EQ(ThreadHomes({{0, 1, 2, 3}}, 4, true, pairs),
            (std::vector<Processors>{{0}, {2}, {1}, {3}}));
}

TEST(TopologyTest, ThreadsAreSharedOutByTheNodesProcessors) {
  const std::string none = testing::TempDir() + "/none";  // cores of one processor
  const std::vector<Processors> nodes = {{0, 1, 2, 3}, {4, 5}};
  EXPECT_EQ(ThreadHomes(nodes, 3, false, none),
            (std::vector<Processors>{nodes[0], nodes[0], nodes[1]}));
  EXPECT_EQ(ThreadHomes(nodes, 6, true, none),
            (std::vector<Processors>{{0}, {1}, {2}, {3}, {4}, {5}}));
  for (int threads = 1; threads <= 20; ++threads) {
    for (const Processors& home : ThreadHomes(nodes, threads, threads % 2 == 0)) {
      EXPECT_FALSE(home.empty()) << threads;
    }
  }
}

TEST(TopologyTest, ThreadsOfASingleNodeRunAnywhereUnlessPinned) {
  EXPECT_EQ(ThreadHomes({{2, 3}}, 3, false), std::vector<Processors>(3));
  EXPECT_EQ(ThreadHomes({{2, 3}}, 3, true, testing::TempDir() + "/none"),
            (std::vector<Processors>{{2}, {3}, {2}}));
}

TEST(TopologyTest, AThreadMovesOnlyFromAnothersProcessorToAFreeOne) {
  const Processors home = {0, 1, 2, 3};
  EXPECT_EQ(FreeProcessor({0, 1, 2}, 2, home), -1);
  EXPECT_EQ(FreeProcessor({0, 0, 1}, 1, home), 2);
  EXPECT_EQ(FreeProcessor({0, 0, 1}, 0, home), -1);  // the other one moves
  EXPECT_EQ(FreeProcessor({0, 0}, 1, {0}), -1);
  EXPECT_EQ(FreeProcessor({0, -1, 0}, 2, {0, 1}), 1);  // a thread that has not run yet
}

}  // namespace
}  // namespace mmfree::cpu
