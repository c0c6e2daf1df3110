#include "tests/integration/live_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

// Another process can only be asked; nothing depends on this interval.
constexpr absl::Duration kPoll = absl::Milliseconds(2);

// The body of an HTTP/1.0 GET from 127.0.0.1; empty when it fails.
std::string HttpGet(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string response;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request = absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: localhost\r\n\r\n");
    if (write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
      char buffer[4096];
      ssize_t got;
      while ((got = read(fd, buffer, sizeof(buffer))) > 0) {
        response.append(buffer, static_cast<size_t>(got));
      }
    }
  }
  close(fd);
  const size_t body = response.find("\r\n\r\n");
  return body == std::string::npos ? "" : response.substr(body + 4);
}

void SetTimeout(grpc::ClientContext* context, absl::Duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
}

}  // namespace

void LiveServer::StartServer(const std::vector<std::string>& flags) {
  absl::StatusOr<std::unique_ptr<ServerProcess>> server = ServerProcess::Start(flags);
  ASSERT_THAT(server, IsOk());
  server_ = *std::move(server);
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  channel_ =
      grpc::CreateCustomChannel(server_->address(), grpc::InsecureChannelCredentials(), arguments);
  inference_ = v1::InferenceService::NewStub(channel_);
  models_ = v1::ModelService::NewStub(channel_);
}

Generation LiveServer::Generate(const v1::GenerateRequest& request, absl::Duration timeout) const {
  grpc::ClientContext context;
  SetTimeout(&context, timeout);
  Generation generation;
  const auto reader = inference_->Generate(&context, request);
  v1::GenerateResponse event;
  while (reader->Read(&event)) {
    generation.events.push_back(event);
    if (event.has_started()) generation.started = event.started();
    if (event.has_finished()) generation.finished = event.finished();
    generation.text += event.delta().text();
    for (const int32_t id : event.delta().token_ids()) generation.token_ids.push_back(id);
  }
  generation.status = reader->Finish();
  return generation;
}

v1::TokenizeResponse LiveServer::Tokenize(const v1::TokenizeRequest& request) const {
  grpc::ClientContext context;
  SetTimeout(&context, Patience(absl::Minutes(2)));
  v1::TokenizeResponse response;
  const grpc::Status status = inference_->Tokenize(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

std::string LiveServer::Detokenize(const std::vector<int32_t>& ids, bool continuation) const {
  grpc::ClientContext context;
  SetTimeout(&context, Patience(absl::Minutes(2)));
  v1::DetokenizeRequest request;
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  request.set_continuation(continuation);
  v1::DetokenizeResponse response;
  const grpc::Status status = inference_->Detokenize(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.text();
}

v1::GetLoadResponse LiveServer::Load() const {
  grpc::ClientContext context;
  SetTimeout(&context, Patience(absl::Minutes(1)));
  v1::GetLoadResponse load;
  const grpc::Status status = models_->GetLoad(&context, {}, &load);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return load;
}

bool LiveServer::AwaitLoad(const std::function<bool(const v1::GetLoadResponse&)>& reached,
                           absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  while (!reached(Load())) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(kPoll);
  }
  return true;
}

void LiveServer::ExpectIdle() const {
  EXPECT_TRUE(AwaitLoad([](const v1::GetLoadResponse& load) {
    return load.running() == 0 && load.queued() == 0 && load.slots_used() == 0 &&
           load.paused() == 0 && load.preempted() == 0 && load.tokens_in_flight() == 0;
  }));
  const absl::Time deadline = absl::Now() + Patience(absl::Minutes(1));
  for (const char* gauge : {"mmfree_num_requests_running{", "mmfree_num_requests_waiting{",
                            "mmfree_num_requests_paused{", "mmfree_num_requests_preempted{",
                            "mmfree_tokens_in_flight{", "mmfree_state_slots_used{"}) {
    while (Metric(gauge) != 0.0 && absl::Now() < deadline) absl::SleepFor(kPoll);
    EXPECT_EQ(Metric(gauge), 0.0) << gauge;
  }
}

std::string LiveServer::Scrape() const { return HttpGet(server_->metrics_port(), "/metrics"); }

double LiveServer::Metric(const std::string& series) const {
  const std::string page = Scrape();
  for (const absl::string_view line : absl::StrSplit(page, '\n')) {
    if (!absl::StartsWith(line, series)) continue;
    double value;
    if (absl::SimpleAtod(line.substr(line.rfind(' ') + 1), &value)) return value;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

v1::GenerateRequest GreedyRequest(const std::string& text, uint32_t max_new_tokens) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_temperature(0.0f);
  request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
  request.mutable_response()->set_return_token_ids(true);
  return request;
}

v1::GenerateRequest EndlessRequest() {
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 60'000);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

std::string BuiltProgram(const std::string& name) {
  return absl::StrCat(MMFREE_BINARY_DIR, "/bin/", name);
}

}  // namespace mmfree
