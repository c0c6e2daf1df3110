// mmfree-load: an open- and closed-loop load generator for mmfree-server.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/load/generator.h"
#include "client/load/report.h"
#include "client/load/session_maker.h"
#include "client/load/workload.h"
#include "server/base/flag_set.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

constexpr char kIntro[] =
    R"(mmfree-load: puts an mmfree-server under load and measures it.

  mmfree-load [--server=HOST:PORT] [flags]

Examples:
  mmfree-load --concurrency=64 --requests=1000 --prompt_tokens=16-256 --max_tokens=exp:64
      closed loop: 64 streams at once
  mmfree-load --rate=200 --duration=30s --requests=1000000 --cancel=0.1 --slow=0.05 --high=0.2
      open loop: 200 new streams a second, some cancelled, some read slowly
  mmfree-load --create_sessions=100000 --prompt_tokens=4 --concurrency=32
      makes the sessions load-0 to load-99999 and runs nothing on them
  mmfree-load --sessions=100000 --prompt_tokens=1 --max_tokens=1 --requests=5000
      turns of them in a random order; the first token is the time to resume one

Lengths are N, LOW-HIGH (uniform) or exp:MEAN. The same seed gives the same requests.
Exit status: 0 every request ended as planned; 1 some failed, or the run did; 2 wrong command line.

)";

struct Flags {
  std::string server = "127.0.0.1:50051";
  std::string prompt_tokens = "32";
  std::string max_tokens = "32";
  float rate = 0;
  float high = 0, low = 0, cancel = 0, slow = 0;
  int32_t connections = 4;
  bool json = false;
  bool quiet = false;
  int64_t create_sessions = 0;
  int64_t server_pid = 0;
  GeneratorOptions generator;
  WorkloadOptions workload;

  void AddTo(FlagSet* set) {
    constexpr int64_t kMost = 1'000'000'000;
    set->Add("server", &server, "HOST:PORT", "the server (default 127.0.0.1:50051)");
    set->Add("model", &workload.model, "NAME", "the model (default: the only one)");
    set->AddInteger<int64_t>("concurrency", &generator.concurrency, 1, 1'000'000, "N",
                             "closed loop: streams at once (default 1)");
    set->Add("rate", &rate, "R", "open loop: streams started a second; 0: closed loop (default)");
    set->AddInteger<int64_t>("requests", &generator.requests, 1, kMost, "N",
                             "streams in all (default 100)");
    set->Add("duration", &generator.duration, "TIME", "start no more after (default: never)");
    set->Add("timeout", &generator.timeout, "TIME", "deadline of each request (default: none)");
    set->Add("prompt_tokens", &prompt_tokens, "LENGTH", "tokens of a prompt (default 32)");
    set->AddInteger<int64_t>("shared_prefix", &workload.shared_prefix, 0, 10'000'000, "N",
                             "tokens before those, the same in every prompt (default 0)");
    set->Add("max_tokens", &max_tokens, "LENGTH", "tokens to generate (default 32)");
    set->Add("temperature", &workload.temperature, "T", "0: greedy (default 1)");
    set->Add("high", &high, "SHARE", "requests of high priority, from 0 to 1 (default 0)");
    set->Add("low", &low, "SHARE", "requests of low priority (default 0)");
    set->Add("cancel", &cancel, "SHARE", "requests cancelled after some tokens (default 0)");
    set->Add("slow", &slow, "SHARE", "requests read slowly (default 0)");
    set->Add("slow_read_delay", &generator.slow_read_delay, "TIME",
             "pause of a slow reader before each message (default 100ms)");
    set->AddInteger<int32_t>("connections", &connections, 1, 1024, "N",
                             "connections to spread the streams over (default 4)");
    set->AddInteger<int64_t>("create_sessions", &create_sessions, 0, kMost, "N",
                             "only make sessions, --concurrency at once (default 0)");
    set->AddInteger<int64_t>("server_pid", &server_pid, 1, kMost, "PID",
                             "with it, measure the server's memory per session");
    set->AddInteger<int64_t>("sessions", &workload.sessions, 0, kMost, "N",
                             "requests are turns of so many sessions that were made so (default 0: "
                             "no sessions)");
    set->Add("seed", &workload.seed, "N", "of the requests (default 1)");
    set->Add("json", &json, "", "machine-readable result");
    set->Add("quiet", &quiet, "", "no progress on stderr");
  }

  absl::Status Check() {
    const auto share = [](absl::string_view name, float value) {
      if (value >= 0 && value <= 1) return absl::OkStatus();
      return absl::InvalidArgumentError(absl::StrCat("--", name, " must be from 0 to 1"));
    };
    MMFREE_RETURN_IF_ERROR(share("high", high));
    MMFREE_RETURN_IF_ERROR(share("low", low));
    MMFREE_RETURN_IF_ERROR(share("cancel", cancel));
    MMFREE_RETURN_IF_ERROR(share("slow", slow));
    if (high + low > 1) return absl::InvalidArgumentError("--high and --low are more than 1");
    if (!(rate >= 0 && rate <= 1e6f)) {
      return absl::InvalidArgumentError("--rate must be from 0 to 1000000");
    }
    const auto length = [](absl::string_view name, absl::string_view text, Distribution* out) {
      const absl::StatusOr<Distribution> parsed = Distribution::Parse(text);
      if (!parsed.ok()) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, "=", parsed.status().message()));
      }
      *out = *parsed;
      return absl::OkStatus();
    };
    MMFREE_RETURN_IF_ERROR(length("prompt_tokens", prompt_tokens, &workload.prompt_tokens));
    MMFREE_RETURN_IF_ERROR(length("max_tokens", max_tokens, &workload.max_tokens));
    generator.rate = rate;
    generator.progress = !quiet;
    workload.high = high;
    workload.low = low;
    workload.cancel = cancel;
    workload.slow = slow;
    return absl::OkStatus();
  }
};

// A stub for each connection. The channels stay until the process ends: the last callback of a call
// still holds its channel, and when that is all that holds any, gRPC 1.51 frees its queue of
// callbacks in the thread that runs them, which then goes on reading the queue.
template <typename Service>
std::vector<std::unique_ptr<typename Service::Stub>> Connect(const Flags& flags) {
  static auto* const channels = new std::vector<std::shared_ptr<grpc::Channel>>;
  std::vector<std::unique_ptr<typename Service::Stub>> stubs;
  for (int32_t i = 0; i < flags.connections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    channels->push_back(
        grpc::CreateCustomChannel(flags.server, grpc::InsecureChannelCredentials(), arguments));
    stubs.push_back(Service::NewStub(channels->back()));
  }
  return stubs;
}

// What a run is to be told by, and whether all went as planned.
struct Outcome {
  std::string text;
  bool failed = false;
};

template <typename Report>
Outcome Told(const Report& report, bool json) {
  return {json ? ToJson(report) + "\n" : ToText(report), !report.errors.empty()};
}

Outcome MakeSessions(const Flags& flags, int64_t state_bytes) {
  SessionMaker maker(flags.workload, flags.create_sessions, flags.generator.concurrency,
                     Connect<v1::SessionService>(flags));
  const int64_t memory_before = flags.server_pid > 0 ? ResidentBytes(flags.server_pid) : 0;
  SessionReport report = maker.Run();
  report.memory_before = memory_before;
  report.memory_after = flags.server_pid > 0 ? ResidentBytes(flags.server_pid) : 0;
  report.state_bytes = state_bytes;
  return Told(report, flags.json);
}

absl::StatusOr<Outcome> RunLoad(Flags& flags) {
  Client::Options connection;
  connection.server = flags.server;
  connection.timeout = absl::Seconds(10);
  MMFREE_ASSIGN_OR_RETURN(const std::unique_ptr<Client> client, Client::Create(connection));
  MMFREE_ASSIGN_OR_RETURN(const v1::GetModelResponse model, client->GetModel(flags.workload.model));
  flags.workload.vocab_size = model.model().vocab_size();
  if (flags.create_sessions > 0) return MakeSessions(flags, model.model().state_bytes());
  Generator generator(flags.generator, flags.workload, Connect<v1::InferenceService>(flags));
  return Told(generator.Run(), flags.json);
}

int Main(const std::vector<std::string>& arguments) {
  Flags flags;
  FlagSet set;
  flags.AddTo(&set);
  const absl::StatusOr<std::vector<std::string>> rest = set.Parse(arguments);
  absl::Status status = rest.status();
  if (status.ok() && set.help_requested()) {
    std::cout << kIntro << set.Help();
    return 0;
  }
  if (status.ok() && !rest->empty()) {
    status = absl::InvalidArgumentError(absl::StrCat("unexpected argument ", rest->front()));
  }
  if (status.ok()) status = flags.Check();
  if (!status.ok()) {
    std::cerr << "mmfree-load: " << status.message() << "; --help says more\n";
    return 2;
  }
  const absl::StatusOr<Outcome> outcome = RunLoad(flags);
  if (!outcome.ok()) {
    std::cerr << "mmfree-load: " << outcome.status().message() << "\n";
    return 1;
  }
  std::cout << outcome->text;
  return outcome->failed ? 1 : 0;
}

}  // namespace
}  // namespace mmfree

int main(int argc, char** argv) { return mmfree::Main({argv + 1, argv + argc}); }
