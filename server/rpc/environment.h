// What every handler is given.
#ifndef MMFREE_SERVER_RPC_ENVIRONMENT_H_
#define MMFREE_SERVER_RPC_ENVIRONMENT_H_

#include "server/base/clock.h"
#include "server/metrics/metrics.h"
#include "server/rpc/call_gate.h"
#include "server/rpc/limits.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/worker_pool.h"
#include "server/sessions/session_table.h"

namespace mmfree {

// Pointers outlive every call.
struct RpcEnvironment {
  const ModelRegistry* models = nullptr;
  Metrics* metrics = nullptr;
  WorkerPool* workers = nullptr;
  CallGate* gate = nullptr;
  SessionTable* sessions = nullptr;       // null: the server keeps no sessions
  WorkerPool* session_threads = nullptr;  // for what blocks on the session store
  const Clock* clock = Clock::Real();
  RequestLimits limits;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_ENVIRONMENT_H_
