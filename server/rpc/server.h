// The gRPC server: services, health, reflection, channelz, TLS and the drain.
#ifndef MMFREE_SERVER_RPC_SERVER_H_
#define MMFREE_SERVER_RPC_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/rpc/limits.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/tls.h"
#include "server/sessions/session_table.h"

namespace mmfree {

// Thread-safe. Destruction cancels the calls in progress and waits for them; Drain first for a
// clean end.
class Server {
 public:
  struct Options {
    std::string listen = "127.0.0.1:0";      // HOST:PORT, [IPV6]:PORT; port 0: any free one
    int64_t max_message_bytes = 32ll << 20;  // of one request
    int worker_threads = 2;                  // tokenize large texts
    absl::Duration keepalive_time = absl::Minutes(1);      // ping a silent client this often,
    absl::Duration keepalive_timeout = absl::Seconds(20);  // and give it up after this long
    TlsOptions tls;
    RequestLimits limits;
    // Outlives the server; null: it keeps no sessions.
    SessionTable* sessions = nullptr;
    int session_threads = 8;  // calls that wait for the session store at once
    const Clock* clock = Clock::Real();
  };

  // Listens and serves. `models` (at least one, filled for good), its engines and `metrics` outlive
  // the server. INVALID_ARGUMENT: an option is wrong; UNAVAILABLE: the address cannot be listened
  // on, and why.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Options& options,
                                                       const ModelRegistry* models,
                                                       Metrics* metrics);
  virtual ~Server() = default;

  virtual int port() const = 0;

  // In this order: health becomes NOT_SERVING; new calls get UNAVAILABLE; admitted ones finish, or
  // end with UNAVAILABLE at `deadline`; the port closes. Blocks until then; once.
  virtual void Drain(absl::Time deadline) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SERVER_H_
