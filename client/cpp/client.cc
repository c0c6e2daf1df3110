#include "client/cpp/client.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "mmfree/v1/inference.grpc.pb.h"
#include "mmfree/v1/model.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "server/base/status_macros.h"

namespace mmfree {

// The context of the running call, so that Cancel can reach it and never outlives it.
struct CancelToken::State {
  absl::Mutex mu;
  bool cancelled ABSL_GUARDED_BY(mu) = false;
  grpc::ClientContext* context ABSL_GUARDED_BY(mu) = nullptr;
};

CancelToken::CancelToken() : state_(std::make_shared<State>()) {}
CancelToken::~CancelToken() = default;

void CancelToken::Cancel() {
  absl::MutexLock lock(&state_->mu);
  state_->cancelled = true;
  if (state_->context != nullptr) state_->context->TryCancel();
}

namespace {

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status details;
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const google::protobuf::Any& detail : details.details()) {
      out.SetPayload(detail.type_url(), absl::Cord(detail.value()));
    }
  }
  return out;
}

template <typename Detail>
bool GetDetail(const absl::Status& status, Detail* detail) {
  const absl::optional<absl::Cord> payload =
      status.GetPayload(absl::StrCat("type.googleapis.com/", Detail::descriptor()->full_name()));
  return payload.has_value() && detail->ParseFromString(std::string(*payload));
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  if (file) content << file.rdbuf();
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  return content.str();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const Client::Options& options) {
  if (!options.tls) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions ssl;
  if (!options.tls_ca_file.empty()) {
    MMFREE_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile(options.tls_ca_file));
  }
  if (!options.tls_cert_file.empty()) {
    MMFREE_ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadFile(options.tls_cert_file));
  }
  if (!options.tls_key_file.empty()) {
    MMFREE_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadFile(options.tls_key_file));
  }
  return grpc::SslCredentials(ssl);
}

}  // namespace

ErrorDetails DetailsOf(const absl::Status& status) {
  ErrorDetails details;
  if (google::rpc::BadRequest bad_request; GetDetail(status, &bad_request)) {
    for (const auto& violation : bad_request.field_violations()) {
      details.violations.push_back({violation.field(), violation.description()});
    }
  }
  if (google::rpc::RetryInfo retry; GetDetail(status, &retry)) {
    details.retry_delay = absl::Seconds(retry.retry_delay().seconds()) +
                          absl::Nanoseconds(retry.retry_delay().nanos());
  }
  return details;
}

class ClientImpl final : public Client {
 public:
  ClientImpl(const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout)
      : channel_(channel),
        timeout_(timeout),
        inference_(v1::InferenceService::NewStub(channel)),
        models_(v1::ModelService::NewStub(channel)),
        sessions_(v1::SessionService::NewStub(channel)),
        health_(grpc::health::v1::Health::NewStub(channel)) {}

  bool AwaitConnection(absl::Duration timeout) override {
    timeout = std::min(timeout, absl::Hours(1));  // an infinite one has no point in time
    return channel_->WaitForConnected(std::chrono::system_clock::now() +
                                      absl::ToChronoMicroseconds(timeout));
  }

  absl::Status Generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateResponse&)>& on_event,
                        CancelToken* cancel) override {
    grpc::ClientContext context;
    Prepare(&context);
    const std::shared_ptr<CancelToken::State> state = cancel == nullptr ? nullptr : cancel->state_;
    if (state != nullptr) {
      absl::MutexLock lock(&state->mu);
      if (state->cancelled) return absl::CancelledError("cancelled before the call");
      state->context = &context;
    }
    const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader =
        inference_->Generate(&context, request);
    v1::GenerateResponse event;
    while (reader->Read(&event)) on_event(event);
    const grpc::Status status = reader->Finish();
    if (state != nullptr) {
      absl::MutexLock lock(&state->mu);
      state->context = nullptr;
    }
    return FromGrpcStatus(status);
  }

  absl::StatusOr<v1::ScoreResponse> Score(const v1::ScoreRequest& request) override {
    return Call(inference_.get(), &v1::InferenceService::Stub::Score, request);
  }
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) override {
    return Call(inference_.get(), &v1::InferenceService::Stub::Tokenize, request);
  }
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request) override {
    return Call(inference_.get(), &v1::InferenceService::Stub::Detokenize, request);
  }
  absl::StatusOr<v1::ListModelsResponse> ListModels() override {
    return Call(models_.get(), &v1::ModelService::Stub::ListModels, v1::ListModelsRequest());
  }
  absl::StatusOr<v1::GetModelResponse> GetModel(const std::string& model) override {
    v1::GetModelRequest request;
    request.set_model(model);
    return Call(models_.get(), &v1::ModelService::Stub::GetModel, request);
  }
  absl::StatusOr<v1::GetLoadResponse> GetLoad(const std::string& model) override {
    v1::GetLoadRequest request;
    request.set_model(model);
    return Call(models_.get(), &v1::ModelService::Stub::GetLoad, request);
  }

  absl::StatusOr<v1::CreateSessionResponse> CreateSession(
      const v1::CreateSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::CreateSession, request);
  }
  absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::GetSession, request);
  }
  absl::StatusOr<v1::ForkSessionResponse> ForkSession(
      const v1::ForkSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::ForkSession, request);
  }
  absl::StatusOr<v1::RewindSessionResponse> RewindSession(
      const v1::RewindSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::RewindSession, request);
  }
  absl::StatusOr<v1::ExportSessionResponse> ExportSession(
      const v1::ExportSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::ExportSession, request);
  }
  absl::StatusOr<v1::ImportSessionResponse> ImportSession(
      const v1::ImportSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::ImportSession, request);
  }
  absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(
      const v1::DeleteSessionRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::DeleteSession, request);
  }
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(
      const v1::ListSessionsRequest& request) override {
    return Call(sessions_.get(), &v1::SessionService::Stub::ListSessions, request);
  }

  absl::StatusOr<std::string> CheckHealth(const std::string& service) override {
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    MMFREE_ASSIGN_OR_RETURN(const grpc::health::v1::HealthCheckResponse response,
                            Call(health_.get(), &grpc::health::v1::Health::Stub::Check, request));
    return grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
  }

 private:
  void Prepare(grpc::ClientContext* context) const {
    if (timeout_ != absl::InfiniteDuration()) {
      context->set_deadline(std::chrono::system_clock::now() +
                            absl::ToChronoMicroseconds(timeout_));
    }
  }

  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(Stub* stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request) {
    grpc::ClientContext context;
    Prepare(&context);
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  const std::shared_ptr<grpc::Channel> channel_;
  const absl::Duration timeout_;
  const std::unique_ptr<v1::InferenceService::Stub> inference_;
  const std::unique_ptr<v1::ModelService::Stub> models_;
  const std::unique_ptr<v1::SessionService::Stub> sessions_;
  const std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

absl::StatusOr<std::unique_ptr<Client>> Client::Create(const Options& options) {
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ChannelCredentials> credentials,
                          MakeCredentials(options));
  grpc::ChannelArguments arguments;
  // Scores and token ids of long texts are large; the server bounds what it is asked.
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  // At most a second between attempts to reach a server that was restarted (AwaitConnection makes
  // them); gRPC's own pauses grow to two minutes, for fleets of clients that share a server.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return std::make_unique<ClientImpl>(
      grpc::CreateCustomChannel(options.server, credentials, arguments), options.timeout);
}

}  // namespace mmfree
