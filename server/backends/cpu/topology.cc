#include "server/backends/cpu/topology.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace mmfree::cpu {
namespace {

constexpr int kMaxProcessor = 1 << 16;

// What names the physical core of a processor: the same text for every processor of it, e.g.
// "0,64".
std::string Core(int cpu, const std::string& directory) {
  std::ifstream file(absl::StrCat(directory, "/cpu", cpu, "/topology/thread_siblings_list"));
  std::string siblings;
  return std::getline(file, siblings) ? siblings : absl::StrCat("cpu", cpu);
}

// The quota over the period that the group's folder tells: one file "200000 100000" of cgroup v2,
// or a file for each of v1. Infinite when there is none.
double GroupQuota(const std::string& group) {
  std::string quota;
  std::string period;
  double quota_us = 0;
  double period_us = 0;
  std::ifstream both(group + "/cpu.max");
  std::ifstream quota_file(group + "/cpu.cfs_quota_us");
  std::ifstream period_file(group + "/cpu.cfs_period_us");
  if (((both >> quota >> period) || (quota_file >> quota && period_file >> period)) &&
      absl::SimpleAtod(quota, &quota_us) && absl::SimpleAtod(period, &period_us) && quota_us > 0 &&
      period_us > 0) {
    return quota_us / period_us;
  }
  return std::numeric_limits<double>::infinity();
}

}  // namespace

int AvailablePhysicalCores() {
  const Processors allowed = AllowedProcessors();
  std::set<std::string> distinct;
  for (int cpu : allowed) distinct.insert(Core(cpu, kProcessorDirectory));
  const int cores = allowed.empty() ? static_cast<int>(std::thread::hardware_concurrency())
                                    : static_cast<int>(distinct.size());
  const double quota = std::ceil(ProcessorQuota());
  return std::max(1, quota < cores ? static_cast<int>(quota) : cores);
}

double ProcessorQuota(const std::string& groups, const std::string& membership) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream file(membership);
  // "0::/path" for cgroup v2, "3:cpu,cpuacct:/path" for a hierarchy of v1.
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::vector<absl::string_view> controllers = absl::StrSplit(parts[1], ',');
    std::string group = groups;
    if (!parts[1].empty()) {
      if (std::find(controllers.begin(), controllers.end(), "cpu") == controllers.end()) continue;
      group += "/cpu";
    }
    // From the root, which in a container is its own group, down to the process's: each may limit.
    least = std::min(least, GroupQuota(group));
    for (absl::string_view name : absl::StrSplit(parts[2], '/', absl::SkipEmpty())) {
      absl::StrAppend(&group, "/", name);
      least = std::min(least, GroupQuota(group));
    }
  }
  return least;
}

Processors AllowedProcessors() {
  Processors processors;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return processors;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
  }
  return processors;
}

bool ParseProcessorList(absl::string_view text, Processors* processors) {
  processors->clear();
  text = absl::StripAsciiWhitespace(text);
  if (text.empty()) return true;  // a node without processors
  for (absl::string_view range : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> ends = absl::StrSplit(range, '-');
    int first = 0;
    int last = 0;
    if (ends.size() > 2 || !absl::SimpleAtoi(ends.front(), &first) ||
        !absl::SimpleAtoi(ends.back(), &last) || first < 0 || last < first ||
        last >= kMaxProcessor) {
      return false;
    }
    for (int cpu = first; cpu <= last; ++cpu) processors->push_back(cpu);
  }
  return true;
}

Processors CoresFirst(const Processors& processors, const std::string& directory) {
  std::map<std::string, int> seen;  // processors of each core
  std::vector<std::pair<int, int>> ranked;
  for (int cpu : processors) ranked.emplace_back(seen[Core(cpu, directory)]++, cpu);
  std::sort(ranked.begin(), ranked.end());
  Processors sorted;
  sorted.reserve(ranked.size());
  for (const auto& [rank, cpu] : ranked) sorted.push_back(cpu);
  return sorted;
}

std::vector<Processors> NumaNodes(const Processors& allowed, const std::string& directory) {
  const auto read = [&directory](const std::string& name, Processors* list) {
    std::ifstream file(absl::StrCat(directory, "/", name));
    std::string text;
    return std::getline(file, text) && ParseProcessorList(text, list);
  };
  std::vector<Processors> nodes;
  size_t found = 0;
  Processors numbers;  // of the nodes, in the format of a processor list
  if (read("online", &numbers)) {
    for (int number : numbers) {
      Processors all;
      if (!read(absl::StrCat("node", number, "/cpulist"), &all)) continue;
      Processors node;
      std::set_intersection(allowed.begin(), allowed.end(), all.begin(), all.end(),
                            std::back_inserter(node));
      found += node.size();
      if (!node.empty()) nodes.push_back(std::move(node));
    }
  }
  if (found != allowed.size()) return {allowed};
  return nodes;
}

std::vector<Processors> ThreadHomes(const std::vector<Processors>& nodes, int threads, bool pin,
                                    const std::string& directory) {
  std::vector<Processors> homes(static_cast<size_t>(threads));
  if (nodes.size() < 2 && !pin) return homes;
  size_t total = 0;
  for (const Processors& node : nodes) total += node.size();
  if (total == 0) return homes;
  int next = 0;
  size_t before = 0;  // processors of the nodes before
  for (const Processors& node : nodes) {
    before += node.size();
    const int end = static_cast<int>(static_cast<size_t>(threads) * before / total);
    const Processors sorted = CoresFirst(node, directory);
    for (size_t i = 0; next < end; ++next, ++i) {
      Processors& home = homes[static_cast<size_t>(next)];
      home = pin ? Processors{sorted[i % sorted.size()]} : sorted;
    }
  }
  return homes;
}

int FreeProcessor(absl::Span<const int> current, int index, const Processors& home) {
  const int* const own = current.begin() + index;
  if (std::find(current.begin(), own, *own) == own) return -1;
  for (int processor : home) {
    if (std::find(current.begin(), current.end(), processor) == current.end()) return processor;
  }
  return -1;
}

}  // namespace mmfree::cpu
