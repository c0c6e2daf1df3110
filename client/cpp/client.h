// C++ client of an mmfree-server: a connection and its calls, with errors as absl::Status.
#ifndef MMFREE_CLIENT_CPP_CLIENT_H_
#define MMFREE_CLIENT_CPP_CLIENT_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "mmfree/v1/inference.pb.h"
#include "mmfree/v1/model.pb.h"
#include "mmfree/v1/session.pb.h"

namespace mmfree {

// A server's error keeps its details (google.rpc.Status) as payloads of the status, by type URL.
struct ErrorDetails {
  struct Violation {
    std::string field;
    std::string description;
  };
  std::vector<Violation> violations;
  absl::Duration retry_delay = absl::ZeroDuration();  // zero: the server did not say
};
ErrorDetails DetailsOf(const absl::Status& status);

// Ends the calls that were started with it. Thread-safe; Cancel may be called from any thread, more
// than once, also before the call starts.
class CancelToken {
 public:
  CancelToken();
  ~CancelToken();
  void Cancel();

 private:
  friend class ClientImpl;
  struct State;
  const std::shared_ptr<State> state_;
};

// Thread-safe. Calls block; each takes a deadline from Options::timeout.
class Client {
 public:
  struct Options {
    std::string server = "127.0.0.1:50051";             // HOST:PORT, or any gRPC target
    absl::Duration timeout = absl::InfiniteDuration();  // of each call
    bool tls = false;
    std::string tls_ca_file;    // PEM; empty: the system's
    std::string tls_cert_file;  // PEM, to show to the server; with tls_key_file
    std::string tls_key_file;
  };

  // Does not connect yet: the first call does. INVALID_ARGUMENT names a file that cannot be read.
  static absl::StatusOr<std::unique_ptr<Client>> Create(const Options& options);
  virtual ~Client() = default;

  // Waits for a connection, at most so long; whether there is one. Between calls nothing else
  // drives the connecting but a poll of gRPC's every five seconds.
  virtual bool AwaitConnection(absl::Duration timeout) = 0;

  // Calls `on_event` for each event, from the calling thread. `cancel` may be null.
  virtual absl::Status Generate(const v1::GenerateRequest& request,
                                const std::function<void(const v1::GenerateResponse&)>& on_event,
                                CancelToken* cancel = nullptr) = 0;

  virtual absl::StatusOr<v1::ScoreResponse> Score(const v1::ScoreRequest& request) = 0;
  virtual absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) = 0;
  virtual absl::StatusOr<v1::DetokenizeResponse> Detokenize(
      const v1::DetokenizeRequest& request) = 0;
  virtual absl::StatusOr<v1::ListModelsResponse> ListModels() = 0;
  virtual absl::StatusOr<v1::GetModelResponse> GetModel(const std::string& model) = 0;
  virtual absl::StatusOr<v1::GetLoadResponse> GetLoad(const std::string& model) = 0;

  virtual absl::StatusOr<v1::CreateSessionResponse> CreateSession(
      const v1::CreateSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::GetSessionResponse> GetSession(
      const v1::GetSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::ListSessionsResponse> ListSessions(
      const v1::ListSessionsRequest& request) = 0;
  virtual absl::StatusOr<v1::ForkSessionResponse> ForkSession(
      const v1::ForkSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::RewindSessionResponse> RewindSession(
      const v1::RewindSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::ExportSessionResponse> ExportSession(
      const v1::ExportSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::ImportSessionResponse> ImportSession(
      const v1::ImportSessionRequest& request) = 0;
  virtual absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(
      const v1::DeleteSessionRequest& request) = 0;

  // grpc.health.v1.Health/Check: "SERVING" or "NOT_SERVING"; NOT_FOUND for a name that the server
  // does not know. An empty name means the whole server.
  virtual absl::StatusOr<std::string> CheckHealth(const std::string& service) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_CLIENT_CPP_CLIENT_H_
