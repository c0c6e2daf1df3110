// Score: submits every text, joins the results.
#ifndef MMFREE_SERVER_RPC_SCORE_HANDLER_H_
#define MMFREE_SERVER_RPC_SCORE_HANDLER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "mmfree/v1/inference.pb.h"
#include "server/rpc/environment.h"

namespace mmfree {

// Returns a reactor that owns itself. The arguments live as long as the RPC.
grpc::ServerUnaryReactor* HandleScore(const RpcEnvironment* env,
                                      grpc::CallbackServerContext* context,
                                      const v1::ScoreRequest* request, v1::ScoreResponse* response);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SCORE_HANDLER_H_
