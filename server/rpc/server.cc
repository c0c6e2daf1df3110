#include "server/rpc/server.h"

#include <grpc/impl/codegen/grpc_types.h>
#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/rpc/call_gate.h"
#include "server/rpc/environment.h"
#include "server/rpc/health.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/services.h"
#include "server/rpc/worker_pool.h"

namespace mmfree {
namespace {

// Texts waiting for a worker; each is at most a message.
constexpr size_t kMaxWaitingTexts = 64;
// Calls waiting for a session thread: more than can be running, for each running turn ends on one.
constexpr size_t kMaxWaitingSessionCalls = 1 << 16;
// What a finished call may still take to reach its client when the drain's time is up.
constexpr absl::Duration kLastWrites = absl::Milliseconds(500);
// Health watchers never end on their own.
constexpr std::chrono::milliseconds kWatcherGrace(100);

class GrpcServer final : public Server {
 public:
  GrpcServer(const Options& options, const ModelRegistry* models, Metrics* metrics)
      : models_(models),
        workers_(options.worker_threads, kMaxWaitingTexts),
        session_threads_(options.session_threads, kMaxWaitingSessionCalls) {
    env_.models = models;
    env_.metrics = metrics;
    env_.workers = &workers_;
    env_.gate = &gate_;
    env_.sessions = options.sessions;
    env_.session_threads = &session_threads_;
    env_.clock = options.clock;
    env_.limits = options.limits;
  }

  ~GrpcServer() override {
    health_.reset();
    // Calls in progress are cancelled; returns when all are done.
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  absl::Status Listen(const Options& options) {
    MMFREE_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress(options.listen));
    MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                            MakeServerCredentials(options.tls));
    if (options.max_message_bytes < 1 ||
        options.max_message_bytes > std::numeric_limits<int>::max()) {
      return absl::InvalidArgumentError(absl::StrCat("max_message_bytes must be in [1, ",
                                                     std::numeric_limits<int>::max(), "], is ",
                                                     options.max_message_bytes));
    }
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::channelz::experimental::InitChannelzService();

    grpc::ServerBuilder builder;
    for (auto make : {MakeInferenceService, MakeModelService, MakeSessionService}) {
      services_.push_back(make(&env_));
      builder.RegisterService(services_.back().get());
    }
    builder.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
    // A score of a long text answers with more bytes than it was asked with.
    builder.SetMaxSendMessageSize(-1);
    const auto milliseconds = [](absl::Duration duration) {
      return static_cast<int>(absl::ToInt64Milliseconds(duration));
    };
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, milliseconds(options.keepalive_time));
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                               milliseconds(options.keepalive_timeout));
    // A stream that waits in the queue is silent: its client may ping, every ten seconds.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    // Two servers on one port would share its connections at random.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(options.listen, credentials, &port_);

    // gRPC logs why a port cannot be had, but does not tell; the probe does.
    if (address.port != 0) MMFREE_RETURN_IF_ERROR(ProbeListenAddress(address));
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port_ == 0) {
      server_.reset();
      MMFREE_RETURN_IF_ERROR(ProbeListenAddress(address));
      return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen));
    }
    health_ =
        std::make_unique<HealthReporter>(server_->GetHealthCheckService(), models_, env_.sessions);
    return absl::OkStatus();
  }

  int port() const override { return port_; }

  void Drain(absl::Time deadline) override {
    health_->Shutdown();
    gate_.Close();
    std::vector<std::thread> drains;
    for (Engine* engine : models_->engines()) {
      drains.emplace_back([engine, deadline] { engine->Drain(deadline); });
    }
    for (std::thread& drain : drains) drain.join();
    gate_.AwaitEmpty(std::max(deadline, absl::Now() + kLastWrites));
    server_->Shutdown(std::chrono::system_clock::now() + kWatcherGrace);
  }

 private:
  const ModelRegistry* const models_;
  CallGate gate_;
  WorkerPool workers_;
  WorkerPool session_threads_;
  RpcEnvironment env_;
  std::vector<std::unique_ptr<grpc::Service>> services_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<HealthReporter> health_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Options& options,
                                                      const ModelRegistry* models,
                                                      Metrics* metrics) {
  auto server = std::make_unique<GrpcServer>(options, models, metrics);
  MMFREE_RETURN_IF_ERROR(server->Listen(options));
  return server;
}

}  // namespace mmfree
