// Generate: validates, tokenizes, submits, streams.
#ifndef MMFREE_SERVER_RPC_GENERATE_HANDLER_H_
#define MMFREE_SERVER_RPC_GENERATE_HANDLER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "mmfree/v1/inference.pb.h"
#include "server/rpc/environment.h"

namespace mmfree {

// Returns a reactor that owns itself. `context` and `request` live as long as the RPC.
grpc::ServerWriteReactor<v1::GenerateResponse>* HandleGenerate(const RpcEnvironment* env,
                                                               grpc::CallbackServerContext* context,
                                                               const v1::GenerateRequest* request);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_GENERATE_HANDLER_H_
