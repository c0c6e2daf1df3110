// The gRPC services: they bind each RPC to its handler and do nothing else.
#ifndef MMFREE_SERVER_RPC_SERVICES_H_
#define MMFREE_SERVER_RPC_SERVICES_H_

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "server/rpc/environment.h"

namespace mmfree {

// `env` outlives the services.
std::unique_ptr<grpc::Service> MakeInferenceService(const RpcEnvironment* env);
std::unique_ptr<grpc::Service> MakeModelService(const RpcEnvironment* env);
std::unique_ptr<grpc::Service> MakeSessionService(const RpcEnvironment* env);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SERVICES_H_
