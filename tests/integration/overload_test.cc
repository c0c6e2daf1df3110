// A real server with more clients than it has slots for: what each of them gets, and what the
// server keeps of those that are gone. Nothing here depends on how fast anything is: what is
// compared are tokens, steps and counts.
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <csignal>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using grpc::health::v1::HealthCheckResponse;

// A stream whose client takes nothing until Read, over the callback API: a thousand of them need
// no threads.
class IdleStream final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  IdleStream(v1::InferenceService::Stub* stub, v1::GenerateRequest request)
      : request_(std::move(request)) {
    stub->async()->Generate(&context_, &request_, this);
    AddHold();
    StartCall();
  }

  // From now on everything is read. At most once.
  void Read() {
    StartRead(&event_);
    RemoveHold();
  }
  // Ends it; only without Read.
  void Cancel() {
    context_.TryCancel();
    RemoveHold();
  }
  grpc::Status WaitForEnd() {
    absl::MutexLock lock(&mutex_, absl::Condition(&done_));
    return status_;
  }
  // Until it was admitted, or has ended.
  void WaitForAnEvent() {
    const auto something = [this]()
                               ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return begun_ || done_; };
    absl::MutexLock lock(&mutex_, absl::Condition(&something));
  }
  bool done() const {
    absl::MutexLock lock(&mutex_);
    return done_;
  }
  // Once it has ended.
  int64_t tokens() const { return tokens_; }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    tokens_ += event_.delta().token_ids_size();
    {
      absl::MutexLock lock(&mutex_);
      begun_ = true;
    }
    StartRead(&event_);
  }
  void OnDone(const grpc::Status& status) override {
    absl::MutexLock lock(&mutex_);
    status_ = status;
    done_ = true;
  }

 private:
  const v1::GenerateRequest request_;
  grpc::ClientContext context_;
  v1::GenerateResponse event_;
  int64_t tokens_ = 0;
  mutable absl::Mutex mutex_;
  bool begun_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mutex_);
};

int64_t ResidentBytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  int64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * 4096;
}

class OverloadTest : public LiveServer {
 protected:
  // A channel whose streams hold next to nothing that was not read, so that a server notices at
  // once when a client stops reading.
  std::unique_ptr<v1::InferenceService::Stub> NarrowStub() const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return v1::InferenceService::NewStub(grpc::CreateCustomChannel(
        server_->address(), grpc::InsecureChannelCredentials(), arguments));
  }

  int64_t StateBytes() const {
    grpc::ClientContext context;
    v1::GetModelResponse response;
    EXPECT_TRUE(models_->GetModel(&context, {}, &response).ok());
    return response.model().state_bytes();
  }

  // Runs mmfree-load against the server.
  ProgramResult RunLoad(std::vector<std::string> flags,
                        absl::Duration timeout = Patience(absl::Minutes(2))) const {
    flags.insert(flags.begin(), {BuiltProgram("mmfree-load"), "--server=" + server_->address(),
                                 "--json", "--quiet"});
    absl::StatusOr<ProgramResult> result = RunProgram(flags, timeout);
    EXPECT_THAT(result, IsOk());
    return result.ok() ? *std::move(result) : ProgramResult();
  }
};

TEST_F(OverloadTest, AThousandClientsThatNeverReadCostOthersNothingAndLittleMemory) {
  constexpr int kClients = 1000;
  // For each: what gRPC keeps of a stream, the state that waits in host memory, the tokens.
  constexpr int64_t kMostBytesEach = 64 << 10;
  StartServer({"--max_sessions=32", "--max_queue=2000", "--max_stream_backlog=1",
               "--stalled_reader_timeout=1h"});
  ASSERT_TRUE(Generate(GreedyRequest("Once", 50)).status.ok());
  const int64_t before = ResidentBytes(server_->pid());
  const auto stub = NarrowStub();
  std::vector<std::unique_ptr<IdleStream>> idle;
  for (int i = 0; i < kClients; ++i) {
    v1::GenerateRequest request = EndlessRequest();
    request.clear_text();
    request.mutable_token_ids()->add_ids(5 + i);
    idle.push_back(std::make_unique<IdleStream>(stub.get(), request));
  }
  ASSERT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) { return load.paused() == kClients; },
                        Patience(absl::Minutes(2))));
  const int64_t memory = ResidentBytes(server_->pid()) - before;
  const int64_t most = kClients * (kMostBytesEach + StateBytes());
  EXPECT_TRUE(memory <= most || kSanitized) << memory;

  // A client that reads gets a slot although a thousand others were there first, and every step is
  // its own: as many as its tokens. At first a transport may still take a message from one of the
  // others, which then emits another; that comes to an end.
  bool alone = false;
  for (int attempt = 0; attempt < 100 && !alone; ++attempt) {
    const double steps = Metric("mmfree_step_duration_seconds_count{");
    const double emitted = Metric("mmfree_generation_tokens_total{");
    const Generation other = Generate(GreedyRequest("Once", 50));
    ASSERT_TRUE(other.status.ok()) << other.status.error_message();
    EXPECT_EQ(other.finished.usage().completion_tokens(), 50);
    alone = Metric("mmfree_generation_tokens_total{") - emitted == 50 &&
            Metric("mmfree_step_duration_seconds_count{") - steps <= 60;
  }
  EXPECT_TRUE(alone);

  // Everything is aborted at once.
  for (const auto& stream : idle) stream->Cancel();
  for (const auto& stream : idle) {
    EXPECT_EQ(stream->WaitForEnd().error_code(), grpc::StatusCode::CANCELLED);
  }
  ExpectIdle();
  if (kSanitized) GTEST_SKIP() << "all but the bound on memory, under a sanitizer";
}

// What a short prompt waits for is its own tokens, however many long ones came before it and
// whether or not they leave a slot.
TEST_F(OverloadTest, LongPromptsHoldUpNoShortOnes) {
  constexpr int kLongs = 6;
  for (const char* slots : {"--max_sessions=64", "--max_sessions=2"}) {
    SCOPED_TRACE(slots);
    StartServer({slots, "--prefix_cache_mb=0"});
    std::vector<std::unique_ptr<IdleStream>> longs;
    for (int i = 0; i < kLongs; ++i) {
      v1::GenerateRequest request;
      for (int token = 0; token < 100'000; ++token) {
        request.mutable_token_ids()->add_ids(5 + (token + i) % 1000);
      }
      request.mutable_stopping()->set_max_new_tokens(1);
      request.mutable_stopping()->set_ignore_eos(true);
      longs.push_back(std::make_unique<IdleStream>(inference_.get(), request));
    }
    ASSERT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) {
      return load.running() > 0 && load.running() + load.queued() == kLongs;
    }));
    constexpr int kShorts = 4;
    v1::GenerateRequest brief = GreedyRequest("The king said", 8);
    brief.mutable_stopping()->set_ignore_eos(true);
    for (int i = 0; i < kShorts; ++i) {
      const Generation generation = Generate(brief);
      ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
    }
    // A long one emits one token when it has been read.
    EXPECT_LE(Metric("mmfree_generation_tokens_total{") - kShorts * 8, 2);
    for (const auto& stream : longs) stream->Cancel();
    for (const auto& stream : longs) stream->WaitForEnd();
    ExpectIdle();
  }
}

// Turns of sessions and lone requests of low priority, in slots that others keep taking away.
TEST_F(OverloadTest, WhoIsPreemptedGetsTheBytesOfAnUndisturbedRun) {
  StartServer({"--max_sessions=2"});
  const auto sessions = v1::SessionService::NewStub(channel_);
  const auto request = [](uint64_t seed) {
    v1::GenerateRequest request = GreedyRequest("The king said", 60);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(1.0f);
    request.mutable_sampling()->set_seed(seed);
    request.set_priority(v1::PRIORITY_LOW);
    return request;
  };
  const auto two_turns = [&](uint64_t seed) {
    v1::CreateSessionResponse created;
    grpc::ClientContext context;
    EXPECT_TRUE(sessions->CreateSession(&context, {}, &created).ok());
    std::string text;
    for (int turn = 0; turn < 2; ++turn) {
      v1::GenerateRequest of_session = request(seed);
      of_session.set_session_id(created.session().id());
      const Generation generation = Generate(of_session, Patience(absl::Minutes(2)));
      EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
      absl::StrAppend(&text, generation.text, "|");
    }
    return text;
  };
  const auto alone = [&](uint64_t seed) {
    const Generation generation = Generate(request(seed), Patience(absl::Minutes(2)));
    EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
    return generation.text;
  };
  const std::string expected_turns = two_turns(1);
  const std::string expected_alone = alone(2);

  const char kPreemptions[] = "mmfree_num_preemptions_total{";
  for (int round = 0; round < 200 && Metric(kPreemptions) < 6; ++round) {
    std::atomic<int> running{4};
    std::vector<std::thread> clients;
    for (int i = 0; i < 4; ++i) {
      clients.emplace_back([&, i] {
        if (i % 2 == 0) {
          EXPECT_EQ(two_turns(1), expected_turns);
        } else {
          EXPECT_EQ(alone(2), expected_alone);
        }
        --running;
      });
    }
    while (running > 0) {
      v1::GenerateRequest urgent = GreedyRequest("Once", 3);
      urgent.set_priority(v1::PRIORITY_HIGH);
      EXPECT_TRUE(Generate(urgent).status.ok());
    }
    for (std::thread& client : clients) client.join();
  }
  EXPECT_GE(Metric(kPreemptions), 6);
  ExpectIdle();
}

TEST_F(OverloadTest, ADrainWithAFullQueueTellsHealthFirstAndFinishesWhatFits) {
  constexpr int kSlots = 50;
  StartServer({absl::StrCat("--max_sessions=", kSlots), absl::StrCat("--max_queue=", kSlots),
               absl::StrCat("--drain_timeout=", absl::FormatDuration(Patience(absl::Seconds(5))))});
  std::vector<std::unique_ptr<IdleStream>> endless;
  for (int i = 0; i < 2 * kSlots - 5; ++i) {
    endless.push_back(std::make_unique<IdleStream>(inference_.get(), EndlessRequest()));
    endless.back()->Read();
  }
  ASSERT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) {
    return load.running() == kSlots && load.queued() == kSlots - 5;
  }));
  // These take slots of the others at once; the last of them runs for twenty steps.
  std::vector<std::unique_ptr<IdleStream>> brief;
  for (int i = 1; i <= 5; ++i) {
    v1::GenerateRequest request = EndlessRequest();
    request.mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(4 * i));
    request.set_priority(v1::PRIORITY_HIGH);
    brief.push_back(std::make_unique<IdleStream>(inference_.get(), request));
    brief.back()->Read();
  }
  grpc::ClientContext context;
  const auto health = grpc::health::v1::Health::NewStub(channel_);
  grpc::health::v1::HealthCheckRequest watched;
  watched.set_service("tales");
  const auto watch = health->Watch(&context, watched);
  HealthCheckResponse told;
  ASSERT_TRUE(watch->Read(&told));
  ASSERT_EQ(told.status(), HealthCheckResponse::SERVING);
  for (const auto& stream : brief) stream->WaitForAnEvent();

  server_->Signal(SIGTERM);
  ASSERT_TRUE(watch->Read(&told));
  EXPECT_EQ(told.status(), HealthCheckResponse::NOT_SERVING);
  for (const auto& stream : endless) EXPECT_FALSE(stream->done());
  for (size_t i = 0; i < brief.size(); ++i) {
    const grpc::Status status = brief[i]->WaitForEnd();
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(brief[i]->tokens(), static_cast<int64_t>(4 * (i + 1)));
  }
  for (const auto& stream : endless) {
    EXPECT_EQ(stream->WaitForEnd().error_code(), grpc::StatusCode::UNAVAILABLE);
  }
  watch->Read(&told);
  watch->Finish();
  const absl::StatusOr<int> code = server_->Wait();
  ASSERT_THAT(code, IsOk());
  EXPECT_EQ(*code, 0);
}

TEST_F(OverloadTest, LoadGeneratorMakesSessionsAndRunsTheirTurns) {
  StartServer();
  const ProgramResult made =
      RunLoad({"--create_sessions=50", "--concurrency=8", "--prompt_tokens=4",
               absl::StrCat("--server_pid=", server_->pid())});
  EXPECT_EQ(made.exit_code, 0) << made.err;
  const nlohmann::json report = nlohmann::json::parse(made.out);
  EXPECT_EQ(report["created"], 50);
  EXPECT_GT(report["checkpoint_bytes"], report["state_bytes"]);
  EXPECT_GT(report["memory_before"], 0);
  const ProgramResult turns = RunLoad({"--sessions=50", "--requests=100", "--concurrency=8",
                                       "--prompt_tokens=1", "--max_tokens=2"});
  EXPECT_EQ(turns.exit_code, 0) << turns.out;
  EXPECT_EQ(nlohmann::json::parse(turns.out)["finished"], 100);
  EXPECT_EQ(Metric("mmfree_session_turns_total{outcome=\"committed\"}"), 100);
  // They are there already.
  EXPECT_EQ(RunLoad({"--create_sessions=1"}).exit_code, 1);
}

TEST_F(OverloadTest, LoadGeneratorsReportAddsUp) {
  StartServer({"--max_sessions=4"});
  const ProgramResult result =
      RunLoad({"--concurrency=8", "--requests=60", "--prompt_tokens=1-16", "--max_tokens=exp:6",
               "--cancel=0.3", "--slow=0.2", "--slow_read_delay=1ms", "--high=0.2", "--low=0.2"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const nlohmann::json report = nlohmann::json::parse(result.out);
  const auto number = [&report](const char* pointer) {
    return report.at(nlohmann::json::json_pointer(pointer)).get<double>();
  };
  EXPECT_EQ(number("/started"), 60);
  EXPECT_EQ(number("/finished") + number("/cancelled"), 60);
  EXPECT_EQ(number("/failed"), 0);
  EXPECT_TRUE(report["errors"].empty());
  EXPECT_LE(number("/most_concurrent"), 8);
  EXPECT_EQ(number("/end_to_end/count"), number("/finished"));
  EXPECT_GE(number("/first_token/count"), number("/finished"));
  EXPECT_GE(number("/tokens_per_s"), number("/finished_tokens_per_s"));
  for (const std::string latency : {"/first_token", "/inter_token", "/end_to_end"}) {
    EXPECT_LE(number((latency + "/p50").c_str()), number((latency + "/p90").c_str()));
    EXPECT_LE(number((latency + "/p99").c_str()), number((latency + "/max").c_str()));
  }
  ExpectIdle();
  EXPECT_GE(Metric("mmfree_generation_tokens_total{"), number("/tokens"));
  EXPECT_GE(Metric("mmfree_rpcs_total{method=\"Generate\",status=\"OK\"}"), number("/finished"));
}

TEST_F(OverloadTest, LoadGeneratorCountsRefusalsByCode) {
  // The scalar kernels: the stream lasts longer than two runs of a program on any machine.
  StartServer({"--max_sessions=1", "--max_queue=0", "--cpu_isa=scalar", kKeepsSlots});
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  for (const char* arrivals : {"--concurrency=4", "--rate=1000"}) {
    const ProgramResult result = RunLoad({arrivals, "--requests=20"});
    EXPECT_EQ(result.exit_code, 1);
    const nlohmann::json report = nlohmann::json::parse(result.out);
    EXPECT_EQ(report["started"].get<int>(), 20);
    EXPECT_EQ(report["failed"].get<int>(), 20);
    EXPECT_EQ(report["errors"].dump(), R"({"RESOURCE_EXHAUSTED":20})");
    EXPECT_EQ(report["tokens"].get<int>(), 0);
  }
  context.TryCancel();
  reader->Finish();
  ExpectIdle();
}

// Two hundred streams, some with slots and some without, and the process that reads them is killed.
TEST_F(OverloadTest, AKilledLoadGeneratorLeavesNothingBehind) {
  StartServer({"--max_sessions=16", "--max_stream_backlog=4"});
  absl::StatusOr<std::unique_ptr<InteractiveProgram>> load = InteractiveProgram::Start(
      {BuiltProgram("mmfree-load"), "--server=" + server_->address(), "--concurrency=200",
       "--requests=200", "--prompt_tokens=1-600", "--max_tokens=60000", "--slow=0.3",
       "--slow_read_delay=1h", "--high=0.3"});
  ASSERT_THAT(load, IsOk());
  ASSERT_TRUE(AwaitLoad(
      [](const v1::GetLoadResponse& load) { return load.running() > 0 && load.queued() > 0; }));
  load->reset();
  ExpectIdle();
  EXPECT_TRUE(Generate(GreedyRequest("Once", 4)).status.ok());
}

}  // namespace
}  // namespace mmfree
