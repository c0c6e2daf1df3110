// Keeps grpc.health.v1 in step with the engines and the session store.
#ifndef MMFREE_SERVER_RPC_HEALTH_H_
#define MMFREE_SERVER_RPC_HEALTH_H_

#include <grpcpp/health_check_service_interface.h>

#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "server/rpc/model_registry.h"
#include "server/sessions/session_table.h"

namespace mmfree {

// Reported names: each model; "" and the names of the inference and model services, which serve
// while every model is healthy; the session service's, where sessions are kept, which needs their
// store too: an outage of it takes nothing from requests without a session; and
// "mmfree.v1.SessionService/whole", not serving while the store knows of sessions that were lost
// with a damaged file, which takes nothing from the others. Others are unknown:
// Check says NOT_FOUND and Watch SERVICE_UNKNOWN. The first report is made by the constructor. Not
// thread-safe.
class HealthReporter {
 public:
  // All outlive the reporter; `sessions` may be null. Looks at them every `period`.
  HealthReporter(grpc::HealthCheckServiceInterface* service, const ModelRegistry* models,
                 const SessionTable* sessions, absl::Duration period = absl::Milliseconds(500));
  ~HealthReporter();

  // Reports NOT_SERVING for everything, for good.
  void Shutdown();

 private:
  void Report();

  grpc::HealthCheckServiceInterface* const service_;
  const ModelRegistry* const models_;
  const SessionTable* const sessions_;
  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_HEALTH_H_
