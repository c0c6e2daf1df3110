#include "server/metrics/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace mmfree {
namespace {

std::optional<std::string> ReadFile(const char* path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Fields of /proc/self/stat from the third (state) on, proc(5) numbering less 3. The second, the
// command's name, may hold spaces and parentheses.
std::vector<std::string> StatFields() {
  const std::optional<std::string> stat = ReadFile("/proc/self/stat");
  if (!stat.has_value()) return {};
  const size_t end_of_name = stat->rfind(')');
  if (end_of_name == std::string::npos) return {};
  return absl::StrSplit(absl::string_view(*stat).substr(end_of_name + 1), absl::ByAnyChar(" \n"),
                        absl::SkipEmpty());
}

std::optional<double> BootTimeSeconds() {
  const std::optional<std::string> stat = ReadFile("/proc/stat");
  if (!stat.has_value()) return std::nullopt;
  for (absl::string_view line : absl::StrSplit(*stat, '\n')) {
    double seconds;
    if (absl::ConsumePrefix(&line, "btime ") && absl::SimpleAtod(line, &seconds)) return seconds;
  }
  return std::nullopt;
}

std::optional<double> OpenFileDescriptors() {
  DIR* const directory = opendir("/proc/self/fd");
  if (directory == nullptr) return std::nullopt;
  int count = 0;
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_name[0] != '.') ++count;
  }
  closedir(directory);
  return count - 1;  // without the directory's own
}

class Output {
 public:
  void Add(const char* name, const char* help, prometheus::MetricType type,
           std::optional<double> value) {
    if (!value.has_value()) return;
    prometheus::MetricFamily family;
    family.name = name;
    family.help = help;
    family.type = type;
    prometheus::ClientMetric metric;
    metric.counter.value = *value;
    metric.gauge.value = *value;
    family.metric.push_back(metric);
    families_.push_back(family);
  }
  std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  std::vector<prometheus::MetricFamily> families_;
};

}  // namespace

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  const std::vector<std::string> fields = StatFields();
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  const auto field = [&](size_t number) -> std::optional<double> {
    double value;
    if (number - 3 >= fields.size() || !absl::SimpleAtod(fields[number - 3], &value)) {
      return std::nullopt;
    }
    return value;
  };
  const auto sum = [](std::optional<double> a, std::optional<double> b) -> std::optional<double> {
    if (!a.has_value() || !b.has_value()) return std::nullopt;
    return *a + *b;
  };
  const auto scaled = [](std::optional<double> a, double factor) -> std::optional<double> {
    if (!a.has_value()) return std::nullopt;
    return *a * factor;
  };
  rlimit limit;
  std::optional<double> max_fds;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) max_fds = static_cast<double>(limit.rlim_cur);

  using prometheus::MetricType;
  Output out;
  out.Add("process_cpu_seconds_total", "User and system CPU time spent, in seconds.",
          MetricType::Counter, scaled(sum(field(14), field(15)), 1.0 / ticks));
  out.Add("process_start_time_seconds", "Start time of the process, in seconds since 1970.",
          MetricType::Gauge, sum(BootTimeSeconds(), scaled(field(22), 1.0 / ticks)));
  out.Add("process_virtual_memory_bytes", "Virtual memory size, in bytes.", MetricType::Gauge,
          field(23));
  out.Add("process_resident_memory_bytes", "Resident memory size, in bytes.", MetricType::Gauge,
          scaled(field(24), static_cast<double>(sysconf(_SC_PAGESIZE))));
  out.Add("process_open_fds", "Open file descriptors. Unit: descriptors.", MetricType::Gauge,
          OpenFileDescriptors());
  out.Add("process_max_fds", "Limit of open file descriptors. Unit: descriptors.",
          MetricType::Gauge, max_fds);
  out.Add("process_threads", "Threads of the process. Unit: threads.", MetricType::Gauge,
          field(20));
  return out.Take();
}

}  // namespace mmfree
