#include "server/metrics/metrics.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <prometheus/registry.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "server/metrics/exposer.h"
#include "server/metrics/gpu_metrics.h"
#include "server/metrics/prefix_cache_metrics.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::Ge;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::Lt;
using ::testing::Not;
using ::testing::StartsWith;

// A connection to a port of the loopback interface.
int ConnectTo(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  return fd;
}

// Body of GET /metrics on the loopback interface.
std::string Scrape(int port) {
  const int fd = ConnectTo(port);
  const std::string request = "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
  EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
  std::string response;
  char buffer[4096];
  for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) response.append(buffer, n);
  close(fd);
  EXPECT_THAT(response, HasSubstr("200 OK"));
  const size_t body = response.find("\r\n\r\n");
  return body == std::string::npos ? "" : response.substr(body + 4);
}

// Value of each sample line, by its name with labels.
std::map<std::string, double> Samples(const std::string& text) {
  std::map<std::string, double> samples;
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    if (line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    double value = 0;
    EXPECT_TRUE(absl::SimpleAtod(line.substr(space + 1), &value)) << line;
    samples[std::string(line.substr(0, space))] = value;
  }
  return samples;
}

ModelInfoLabels Info(const std::string& model, const std::string& digest) {
  return {model, digest, /*backend=*/"cpu", /*description=*/"x", /*replica=*/""};
}

class MetricsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto exposer = StartExposer("127.0.0.1:0", registry_);
    ASSERT_TRUE(exposer.ok()) << exposer.status();
    exposer_ = *std::move(exposer);
  }

  std::map<std::string, double> ScrapeSamples() { return Samples(Scrape(exposer_->port())); }

  // Touches every instrument.
  void UseEverything() {
    model_->SetQueued(3);
    model_->SetRunning(2);
    model_->SetPaused(1);
    model_->SetPreempted(2);
    model_->CountPreemptions(5);
    model_->SetTokensInFlight(1234);
    model_->SetEstimatedWait(absl::Milliseconds(250));
    model_->SetSlots(2, 8);
    model_->ObserveStep(ModelMetrics::StepKind::kPrefill, 1, 256, absl::Milliseconds(20));
    model_->ObserveStep(ModelMetrics::StepKind::kDecode, 2, 2, absl::Milliseconds(1));
    model_->ObserveStep(ModelMetrics::StepKind::kMixed, 3, 200, absl::Milliseconds(15));
    model_->CountRequest("eos");
    model_->CountRequest("invalid_argument");
    model_->CountPromptTokens(100);
    model_->CountGeneratedTokens(7);
    model_->CountPrefixLookup(90, /*joined=*/true);
    model_->CountPrefixLookup(10, /*joined=*/false);
    model_->CountPrefixLookup(0, /*joined=*/false);
    prefix_cache_->SetBytes(5000);
    prefix_cache_->SetCheckpoints(4);
    prefix_cache_->CountEvictions(2);
    model_->CountSpeculation(4, 0);
    model_->CountSpeculation(5, 4);
    model_->ObserveQueueTime(absl::Milliseconds(1));
    model_->ObserveTimeToFirstToken(absl::Milliseconds(30));
    model_->ObserveInterTokenLatency(absl::Milliseconds(2), 1);
    model_->ObserveInterTokenLatency(absl::Microseconds(150), 1000);
    model_->ObserveEndToEndLatency(absl::Seconds(1));
    model_->ObserveRequestTokens(100, 7);
    metrics_->CountRpc("Generate", "OK");
  }

  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(registry_.get());
  std::unique_ptr<PrefixCacheMetrics> prefix_cache_ = PrefixCacheMetrics::Create(registry_.get());
  ModelMetrics* model_ = metrics_->ForModel(Info("tales", "d1"));
  std::unique_ptr<MetricsExposer> exposer_;
};

TEST_F(MetricsTest, EveryInstrumentIsScrapedWithItsValue) {
  UseEverything();
  const std::map<std::string, double> samples = ScrapeSamples();
  const std::map<std::string, double> expected = {
      {"mmfree_num_requests_waiting{model=\"tales\"}", 3},
      {"mmfree_num_requests_running{model=\"tales\"}", 2},
      {"mmfree_num_requests_paused{model=\"tales\"}", 1},
      {"mmfree_num_requests_preempted{model=\"tales\"}", 2},
      {"mmfree_num_preemptions_total{model=\"tales\"}", 5},
      {"mmfree_tokens_in_flight{model=\"tales\"}", 1234},
      {"mmfree_estimated_wait_seconds{model=\"tales\"}", 0.25},
      {"mmfree_state_slots_used{model=\"tales\"}", 2},
      {"mmfree_state_slots{model=\"tales\"}", 8},
      {"mmfree_requests_total{model=\"tales\",outcome=\"eos\"}", 1},
      {"mmfree_requests_total{model=\"tales\",outcome=\"cancelled\"}", 0},
      {"mmfree_prompt_tokens_total{model=\"tales\"}", 100},
      {"mmfree_generation_tokens_total{model=\"tales\"}", 7},
      {"mmfree_prefix_cache_hits_total{model=\"tales\"}", 2},
      {"mmfree_prefix_cache_misses_total{model=\"tales\"}", 1},
      {"mmfree_prefix_cache_cached_tokens_total{model=\"tales\"}", 100},
      {"mmfree_prefix_cache_joins_total{model=\"tales\"}", 1},
      {"mmfree_prefix_cache_bytes", 5000},
      {"mmfree_prefix_cache_checkpoints", 4},
      {"mmfree_prefix_cache_evictions_total", 2},
      {"mmfree_speculative_rows_total{model=\"tales\"}", 2},
      {"mmfree_speculative_proposed_tokens_total{model=\"tales\"}", 9},
      {"mmfree_speculative_accepted_tokens_total{model=\"tales\"}", 4},
      {"mmfree_request_queue_time_seconds_count{model=\"tales\"}", 1},
      {"mmfree_time_to_first_token_seconds_sum{model=\"tales\"}", 0.03},
      {"mmfree_e2e_request_latency_seconds_sum{model=\"tales\"}", 1},
      {"mmfree_request_prompt_tokens_sum{model=\"tales\"}", 100},
      {"mmfree_request_generation_tokens_sum{model=\"tales\"}", 7},
      {"mmfree_step_duration_seconds_count{kind=\"prefill\",model=\"tales\"}", 1},
      {"mmfree_step_duration_seconds_sum{kind=\"mixed\",model=\"tales\"}", 0.015},
      {"mmfree_step_batch_size_sum{model=\"tales\"}", 6},
      {"mmfree_step_tokens_sum{model=\"tales\"}", 458},
      {"mmfree_rpcs_total{method=\"Generate\",status=\"OK\"}", 1},
      {"mmfree_model_info{backend=\"cpu\",description=\"x\",digest=\"d1\",model=\"tales\"}", 1},
  };
  for (const auto& [name, value] : expected) {
    ASSERT_TRUE(samples.count(name)) << name;
    EXPECT_DOUBLE_EQ(samples.at(name), value) << name;
  }
}

TEST_F(MetricsTest, ManyEqualObservationsCountAsThatManySingleOnes) {
  for (const auto& [time, tokens] :
       std::vector<std::pair<absl::Duration, int64_t>>{{absl::Microseconds(50), 10},
                                                       {absl::Microseconds(100), 20},
                                                       {absl::Microseconds(101), 30},
                                                       {absl::Seconds(100), 40}}) {
    model_->ObserveInterTokenLatency(time, tokens);
    for (int64_t i = 0; i < tokens; ++i) {
      metrics_->ForModel(Info("singly", "d1"))->ObserveInterTokenLatency(time, 1);
    }
  }
  const std::map<std::string, double> samples = ScrapeSamples();
  int compared = 0;
  for (const auto& [name, value] : samples) {
    if (name.find("inter_token_latency") == std::string::npos) continue;
    const size_t at = name.find("model=\"tales\"");
    if (at == std::string::npos) continue;
    std::string other = name;
    other.replace(at, 13, "model=\"singly\"");
    EXPECT_NEAR(samples.at(other), value, 1e-9 * value) << name;
    ++compared;
  }
  EXPECT_GT(compared, 10);
  EXPECT_EQ(samples.at("mmfree_inter_token_latency_seconds_bucket{model=\"tales\",le=\"0.0001\"}"),
            30);
  EXPECT_EQ(samples.at("mmfree_inter_token_latency_seconds_count{model=\"tales\"}"), 100);
}

TEST_F(MetricsTest, OneNameGivesTheSameInstrumentsAndOneInfoSeries) {
  EXPECT_EQ(metrics_->ForModel(Info("tales", "d2")), model_);
  const std::string text = Scrape(exposer_->port());
  EXPECT_THAT(text, HasSubstr("digest=\"d2\""));
  EXPECT_THAT(text, Not(HasSubstr("digest=\"d1\"")));
}

TEST_F(MetricsTest, ProcessMetricsTellTheTruth) {
  const std::map<std::string, double> samples = ScrapeSamples();
  EXPECT_THAT(samples.at("process_resident_memory_bytes"), AllOf(Gt(1e5), Lt(1e12)));
  EXPECT_THAT(samples.at("process_virtual_memory_bytes"),
              Ge(samples.at("process_resident_memory_bytes")));
  EXPECT_THAT(samples.at("process_start_time_seconds"),
              AllOf(Gt(1.5e9), Le(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()) + 2)));
  EXPECT_GE(samples.at("process_cpu_seconds_total"), 0);
  EXPECT_GE(samples.at("process_open_fds"), 4);
  EXPECT_GE(samples.at("process_max_fds"), samples.at("process_open_fds"));
  EXPECT_GE(samples.at("process_threads"), 2);

  std::vector<std::ifstream> open(10);
  for (std::ifstream& file : open) file.open("/proc/self/stat");
  EXPECT_GE(ScrapeSamples().at("process_open_fds"), samples.at("process_open_fds") + 10);
}

TEST_F(MetricsTest, EveryFamilyHasAHelpLineAndItsUnit) {
  UseEverything();
  std::map<std::string, std::string> help;
  std::vector<std::string> families;
  for (absl::string_view line : absl::StrSplit(Scrape(exposer_->port()), '\n')) {
    const std::vector<std::string> words = absl::StrSplit(line, absl::MaxSplits(' ', 3));
    if (words.size() == 4 && words[0] == "#" && words[1] == "HELP") {
      EXPECT_TRUE(help.emplace(words[2], words[3]).second) << "two HELP lines for " << words[2];
    }
    if (words.size() == 4 && words[0] == "#" && words[1] == "TYPE") families.push_back(words[2]);
  }
  EXPECT_GT(families.size(), 20u);
  for (const std::string& family : families) {
    if (family.rfind("mmfree_", 0) != 0) continue;
    EXPECT_THAT(help[family], ::testing::AnyOf(HasSubstr("Unit: "), HasSubstr("in seconds"),
                                               StartsWith("Always 1")))
        << family;
  }
}

TEST_F(MetricsTest, PromtoolFindsNothingToComplainAbout) {
  if (std::system("command -v promtool > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "promtool is not installed (Debian package: prometheus)";
  }
  UseEverything();
  const std::string path = absl::StrCat(::testing::TempDir(), "/mmfree_metrics_", getpid(), ".txt");
  std::ofstream(path) << Scrape(exposer_->port());
  FILE* const pipe = popen(absl::StrCat("promtool check metrics < ", path, " 2>&1").c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  char buffer[512];
  while (fgets(buffer, sizeof(buffer), pipe) != nullptr) output += buffer;
  const int status = pclose(pipe);
  unlink(path.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 0) << output;
  EXPECT_EQ(output, "");
}

TEST_F(MetricsTest, InstrumentsMayBeUsedFromManyThreadsWhileBeingScraped) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this] {
      for (int i = 0; i < 200; ++i) UseEverything();
    });
  }
  for (int i = 0; i < 5; ++i) Scrape(exposer_->port());
  for (std::thread& thread : threads) thread.join();
  const std::map<std::string, double> samples = ScrapeSamples();
  EXPECT_EQ(samples.at("mmfree_generation_tokens_total{model=\"tales\"}"), 800 * 7);
  EXPECT_EQ(samples.at("mmfree_inter_token_latency_seconds_count{model=\"tales\"}"), 800 * 1001);
}

TEST_F(MetricsTest, SilentConnectionsKeepNeitherAScrapeNorTheEndWaiting) {
  constexpr int kMoreThanThreads = 12;
  std::vector<int> silent;
  for (int i = 0; i < kMoreThanThreads; ++i) silent.push_back(ConnectTo(exposer_->port()));
  const absl::Time start = absl::Now();
  EXPECT_THAT(Scrape(exposer_->port()), HasSubstr("process_open_fds"));
  for (int i = 0; i < kMoreThanThreads; ++i) silent.push_back(ConnectTo(exposer_->port()));
  exposer_.reset();
  // The library's default is half a minute for each of them.
  EXPECT_LT(absl::Now() - start, absl::Seconds(15));
  for (const int fd : silent) close(fd);
}

TEST_F(MetricsTest, APortInUseIsAClearError) {
  const auto second = StartExposer(absl::StrCat("127.0.0.1:", exposer_->port()), registry_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              AllOf(HasSubstr(absl::StrCat("127.0.0.1:", exposer_->port())),
                    HasSubstr("Address already in use")));
}

TEST(GpuMetricsTest, EachDeviceIsRepeatedAtEveryScrapeWithWhatItTells) {
  double joules = 1;
  GpuReading whole;
  whole.memory_used_bytes = 3e9;
  whole.memory_total_bytes = 8e9;
  whole.utilization = 0.25;
  whole.power_watts = 350.5;
  const auto first = [&joules, whole] {
    GpuReading reading = whole;
    reading.energy_joules = joules;
    return reading;
  };
  GpuReading partial;
  partial.memory_used_bytes = 7;
  const auto gpus = std::make_shared<GpuMetrics>(std::vector<GpuMetrics::Gpu>{
      {"0", "NVIDIA H200", first}, {"3", "other", [partial] { return partial; }}});
  const auto exposer =
      StartExposer("127.0.0.1:0", std::make_shared<prometheus::Registry>(), {gpus});
  ASSERT_TRUE(exposer.ok()) << exposer.status();
  std::map<std::string, double> samples = Samples(Scrape((*exposer)->port()));
  const std::string labels = R"({gpu="0",name="NVIDIA H200"})";
  EXPECT_EQ(samples.at("mmfree_gpu_memory_used_bytes" + labels), 3e9);
  EXPECT_EQ(samples.at("mmfree_gpu_memory_total_bytes" + labels), 8e9);
  EXPECT_EQ(samples.at("mmfree_gpu_utilization_ratio" + labels), 0.25);
  EXPECT_EQ(samples.at("mmfree_gpu_power_watts" + labels), 350.5);
  EXPECT_EQ(samples.at("mmfree_gpu_energy_joules_total" + labels), 1);
  EXPECT_EQ(samples.at(R"(mmfree_gpu_memory_used_bytes{gpu="3",name="other"})"), 7);
  EXPECT_EQ(samples.count(R"(mmfree_gpu_power_watts{gpu="3",name="other"})"), 0u);
  joules = 2.5;
  samples = Samples(Scrape((*exposer)->port()));
  EXPECT_EQ(samples.at("mmfree_gpu_energy_joules_total" + labels), 2.5);
}

TEST(ExposerTest, AddressesThatAreNotHostAndPortAreRefused) {
  for (const char* address :
       {"", "9090", ":9090", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536",
        "127.0.0.1:-1", "127.0.0.1:9090s", "127.0.0.1:9090,8080", "[::1:0", "no host:0"}) {
    const auto exposer = StartExposer(address, std::make_shared<prometheus::Registry>());
    EXPECT_EQ(exposer.status().code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_THAT(std::string(exposer.status().message()), HasSubstr(address));
  }
}

TEST(ExposerTest, HostNamesAreResolved) {
  const auto exposer = StartExposer("localhost:0", std::make_shared<prometheus::Registry>());
  ASSERT_TRUE(exposer.ok()) << exposer.status();
  EXPECT_GT((*exposer)->port(), 0);
}

}  // namespace
}  // namespace mmfree
