// CreateSession: runs the system prompt, when there is one, and makes the session.
#ifndef MMFREE_SERVER_RPC_CREATE_SESSION_HANDLER_H_
#define MMFREE_SERVER_RPC_CREATE_SESSION_HANDLER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "mmfree/v1/session.pb.h"
#include "server/rpc/environment.h"

namespace mmfree {

// Returns a reactor that owns itself. The pointers live as long as the RPC.
grpc::ServerUnaryReactor* HandleCreateSession(const RpcEnvironment* env,
                                              grpc::CallbackServerContext* context,
                                              const v1::CreateSessionRequest* request,
                                              v1::CreateSessionResponse* response);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_CREATE_SESSION_HANDLER_H_
