// Start, health, reflection, metrics, TLS and the end of a real server.
#include <grpcpp/generic/generic_stub.h>

#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

using grpc::health::v1::HealthCheckResponse;

std::string Tales() { return absl::StrCat(MMFREE_SOURCE_DIR, "/deploy/models/tales"); }

ProgramResult RunServer(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), BuiltProgram("mmfree-server"));
  absl::StatusOr<ProgramResult> result = RunProgram(arguments);
  EXPECT_THAT(result, IsOk());
  return result.ok() ? *std::move(result) : ProgramResult();
}

class LifecycleTest : public LiveServer {
 protected:
  std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> Watch(grpc::ClientContext* context,
                                                                 const std::string& service) {
    health_ = grpc::health::v1::Health::NewStub(channel_);
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    return health_->Watch(context, request);
  }

  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

TEST_F(LifecycleTest, TermDrainsHealthFirstAndRunningStreamsFinish) {
  StartServer({"--drain_timeout=10m"});
  grpc::ClientContext watch_context;
  const auto watch = Watch(&watch_context, "tales");
  HealthCheckResponse health;
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::SERVING);

  grpc::ClientContext context;
  v1::GenerateRequest request = EndlessRequest();
  request.mutable_stopping()->set_max_new_tokens(200);
  const auto reader = inference_->Generate(&context, request);
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));

  server_->Signal(SIGTERM);
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::NOT_SERVING);
  // New calls are refused right after (one may still slip in between), while the admitted one runs
  // to its end.
  Generation refused = Generate(GreedyRequest("Once", 1));
  for (const absl::Time limit = absl::Now() + Patience(absl::Minutes(1));
       refused.status.ok() && absl::Now() < limit;) {
    refused = Generate(GreedyRequest("Once", 1));
  }
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  while (reader->Read(&event)) {
  }
  EXPECT_TRUE(event.has_finished());
  EXPECT_EQ(event.finished().usage().completion_tokens(), 200);
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_THAT(server_->Wait(), IsOk());
  EXPECT_FALSE(watch->Read(&health));
  watch->Finish();
  EXPECT_THAT(server_->Log(), HasSubstr("drained"));
}

TEST_F(LifecycleTest, DrainTimeoutEndsWhatStillRuns) {
  StartServer({"--drain_timeout=100ms"});
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  server_->Signal(SIGINT);
  while (reader->Read(&event)) {
  }
  EXPECT_FALSE(event.has_finished());
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  const absl::StatusOr<int> code = server_->Wait();
  ASSERT_THAT(code, IsOk());
  EXPECT_EQ(*code, 0);
}

TEST_F(LifecycleTest, SecondSignalStopsAtOnce) {
  StartServer({"--drain_timeout=10m"});
  grpc::ClientContext watch_context;
  const auto watch = Watch(&watch_context, "");
  HealthCheckResponse health;
  ASSERT_TRUE(watch->Read(&health));
  grpc::ClientContext context;
  const auto reader = inference_->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  ASSERT_TRUE(reader->Read(&event));
  server_->Signal(SIGTERM);
  ASSERT_TRUE(watch->Read(&health));  // the first one was taken
  server_->Signal(SIGTERM);
  const absl::StatusOr<int> code = server_->Wait();
  ASSERT_THAT(code, IsOk());
  EXPECT_EQ(*code, 1);
}

TEST_F(LifecycleTest, StartingErrorsSayWhatIsWrong) {
  ProgramResult result = RunServer({"--model=/no/such/model", "--listen=127.0.0.1:0"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("/no/such/model"));

  result = RunServer({"--no_such_flag"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr("--no_such_flag"), HasSubstr("--help")));

  result = RunServer({"--help"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.out, HasSubstr("--port_file"));

  StartServer();
  result = RunServer({"--model=" + Tales(), "--backend=cpu",
                      "--metrics_listen=", "--listen=" + server_->address()});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr(server_->address()), HasSubstr("in use")));

  result = RunServer({"--model=" + Tales(), "--backend=cpu", "--listen=127.0.0.1:0",
                      absl::StrCat("--metrics_listen=127.0.0.1:", server_->metrics_port())});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr(absl::StrCat(server_->metrics_port())));

  result = RunServer({"--model=" + Tales(), "--backend=cpu", "--listen=127.0.0.1:0",
                      "--metrics_listen=", "--port_file=/no/such/directory/ports"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("/no/such/directory/ports"));
}

// Whatever is said about the ports must be found before a load that can take minutes.
TEST_F(LifecycleTest, WrongFilesAreFoundBeforeTheModelIsLoaded) {
  const TempDirectory directory;
  for (const std::vector<std::string>& wrong : std::vector<std::vector<std::string>>{
           {"--port_file=/no/such/directory/ports"},
           {"--port_file=" + directory.path()},
           {"--tls_cert=/no/such/cert", "--tls_key=/no/such/key"}}) {
    std::vector<std::string> arguments = {"--model=" + Tales(), "--listen=127.0.0.1:0"};
    arguments.insert(arguments.end(), wrong.begin(), wrong.end());
    const ProgramResult result = RunServer(arguments);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_THAT(result.err, HasSubstr(wrong[0].substr(0, wrong[0].find('='))));
    EXPECT_THAT(result.err, Not(HasSubstr("loaded in")));
  }
}

TEST_F(LifecycleTest, PortFileReplacesNothingButAnEarlierPortFile) {
  const TempDirectory directory;
  const std::string nothing = directory.File("empty_directory");
  std::filesystem::create_directory(nothing);
  const ProgramResult result = RunServer({"--model=" + Tales(), "--listen=127.0.0.1:0",
                                          "--metrics_listen=", "--port_file=" + nothing});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("not a regular file"));
  EXPECT_TRUE(std::filesystem::is_directory(nothing));

  // One of an earlier run goes at once: it would say that a server that fails to start is serving.
  const std::string stale = directory.File("ports");
  WriteFile(stale, "grpc=1\n");
  RunServer({"--model=/no/such/model", "--port_file=" + stale});
  EXPECT_FALSE(std::filesystem::exists(stale));
}

TEST_F(LifecycleTest, ReflectionListsTheServices) {
  StartServer();
  // ServerReflectionRequest{list_services: "*"}, by hand: the library's header is not packaged.
  const grpc::Slice slice("\x3a\x01*");
  const grpc::ByteBuffer request(&slice, 1);
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto next = [&queue] {
    void* tag;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  call->StartCall(nullptr);
  ASSERT_TRUE(next());
  call->Write(request, nullptr);
  ASSERT_TRUE(next());
  grpc::ByteBuffer response;
  call->Read(&response, nullptr);
  ASSERT_TRUE(next());
  grpc::Slice bytes;
  ASSERT_TRUE(response.TrySingleSlice(&bytes).ok() || response.DumpToSingleSlice(&bytes).ok());
  const std::string services(reinterpret_cast<const char*>(bytes.begin()), bytes.size());
  for (const char* service :
       {"mmfree.v1.InferenceService", "mmfree.v1.ModelService", "mmfree.v1.SessionService",
        "grpc.health.v1.Health", "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection"}) {
    EXPECT_THAT(services, HasSubstr(service));
  }
  grpc::Status status;
  call->WritesDone(nullptr);
  next();
  call->Finish(&status, nullptr);
  EXPECT_TRUE(next());
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(LifecycleTest, MetricsPageIsWellFormed) {
  StartServer();
  ASSERT_TRUE(Generate(GreedyRequest("Once", 8)).status.ok());
  // A call is counted when the server is done with it, which its client may know a little earlier.
  const std::string counted = "mmfree_rpcs_total{method=\"Generate\",status=\"OK\"} 1";
  std::string page = Scrape();
  for (const absl::Time limit = absl::Now() + Patience(absl::Minutes(1));
       !absl::StrContains(page, counted) && absl::Now() < limit;) {
    page = Scrape();
  }
  EXPECT_THAT(page,
              AllOf(HasSubstr(counted), HasSubstr("mmfree_time_to_first_token_seconds_count")));
  const TempDirectory directory;
  WriteFile(directory.File("page"), page);
  const absl::StatusOr<ProgramResult> result =
      RunProgram({"sh", "-c", absl::StrCat("promtool check metrics < ", directory.File("page"))});
  ASSERT_THAT(result, IsOk());
  if (result->exit_code == 127) GTEST_SKIP() << "promtool is not installed";
  EXPECT_EQ(result->exit_code, 0) << result->out << result->err;
}

TEST_F(LifecycleTest, TlsWithAClientCertificate) {
  const TempDirectory directory;
  const std::string cert = directory.File("cert.pem");
  const std::string key = directory.File("key.pem");
  const absl::StatusOr<ProgramResult> made = RunProgram(
      {"openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
       "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert});
  if (!made.ok() || made->exit_code != 0) GTEST_SKIP() << "the openssl program is not installed";
  StartServer({"--tls_cert=" + cert, "--tls_key=" + key, "--tls_client_ca=" + cert});
  const std::vector<std::string> tls = {"--tls", "--tls_ca=" + cert, "--timeout=1m", "health"};
  absl::StatusOr<ProgramResult> health = server_->Client(tls);
  ASSERT_THAT(health, IsOk());
  EXPECT_EQ(health->exit_code, 1) << "a client without a certificate was let in";
  std::vector<std::string> mutual = tls;
  mutual.insert(mutual.begin(), {"--tls_cert=" + cert, "--tls_key=" + key});
  health = server_->Client(mutual);
  ASSERT_THAT(health, IsOk());
  EXPECT_EQ(health->exit_code, 0) << health->err;
  EXPECT_EQ(health->out, "SERVING\n");

  const std::string other = directory.File("other.pem");
  ASSERT_THAT(RunProgram({"openssl", "genrsa", "-out", other, "2048"}), IsOk());
  const ProgramResult mismatch =
      RunServer({"--model=" + Tales(), "--backend=cpu", "--listen=127.0.0.1:0",
                 "--metrics_listen=", "--tls_cert=" + cert, "--tls_key=" + other});
  EXPECT_EQ(mismatch.exit_code, 1);
  EXPECT_THAT(mismatch.err, AllOf(HasSubstr("--tls_key"), HasSubstr(other)));
}

TEST_F(LifecycleTest, SeveralModelsAreServedByName) {
  StartServer({"--model=second=" + Tales()});
  EXPECT_TRUE(Metric("mmfree_state_slots{model=\"second\"}") > 0);
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 8);
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_model("tales");
  const Generation first = Generate(request);
  request.set_model("second");
  const Generation second = Generate(request);
  ASSERT_TRUE(first.status.ok() && second.status.ok());
  EXPECT_EQ(second.started.model(), "second");
  EXPECT_EQ(second.text, first.text);
}

}  // namespace
}  // namespace mmfree
