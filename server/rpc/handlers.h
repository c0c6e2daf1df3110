// The RPCs that compute an answer at once. Each validates its request, fills in the response and
// returns the RPC's status. Thread-safe.
#ifndef MMFREE_SERVER_RPC_HANDLERS_H_
#define MMFREE_SERVER_RPC_HANDLERS_H_

#include "absl/status/status.h"
#include "mmfree/v1/inference.pb.h"
#include "mmfree/v1/model.pb.h"
#include "server/rpc/environment.h"

namespace mmfree {

absl::Status HandleTokenize(const RpcEnvironment& env, const v1::TokenizeRequest& request,
                            v1::TokenizeResponse* response);
absl::Status HandleDetokenize(const RpcEnvironment& env, const v1::DetokenizeRequest& request,
                              v1::DetokenizeResponse* response);
absl::Status HandleListModels(const RpcEnvironment& env, const v1::ListModelsRequest& request,
                              v1::ListModelsResponse* response);
absl::Status HandleGetModel(const RpcEnvironment& env, const v1::GetModelRequest& request,
                            v1::GetModelResponse* response);
absl::Status HandleGetLoad(const RpcEnvironment& env, const v1::GetLoadRequest& request,
                           v1::GetLoadResponse* response);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_HANDLERS_H_
