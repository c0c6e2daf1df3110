#include "mmfree/v1/model.grpc.pb.h"
#include "server/rpc/handlers.h"
#include "server/rpc/malformed.h"
#include "server/rpc/services.h"
#include "server/rpc/unary_call.h"
#include "server/rpc/unimplemented.h"

namespace mmfree {
namespace {

class ModelService final : public ParsingService<v1::ModelService::CallbackService> {
 public:
  explicit ModelService(const RpcEnvironment* env) : ParsingService(env) {
    Answer(0, "ListModels", &ModelService::ListModels);
    Answer(1, "GetModel", &ModelService::GetModel);
    Answer(2, "LoadModel", &ModelService::LoadModel);
    Answer(3, "UnloadModel", &ModelService::UnloadModel);
    Answer(4, "GetLoad", &ModelService::GetLoad);
  }

  // A draining server still says what it is and how busy: load balancers ask.
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override {
    return RunUnary(
        env_, "ListModels", context, DuringDrain::kAnswer, 0,
        [this, request, response] { return HandleListModels(*env_, *request, response); });
  }

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override {
    return RunUnary(env_, "GetModel", context, DuringDrain::kAnswer, 0, [this, request, response] {
      return HandleGetModel(*env_, *request, response);
    });
  }

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override {
    return RunUnary(env_, "GetLoad", context, DuringDrain::kAnswer, 0,
                    [this, request, response] { return HandleGetLoad(*env_, *request, response); });
  }

  grpc::ServerWriteReactor<v1::LoadModelResponse>* LoadModel(grpc::CallbackServerContext* context,
                                                             const v1::LoadModelRequest*) override {
    return UnimplementedStream<v1::LoadModelResponse>(env_, "LoadModel", context);
  }

  grpc::ServerUnaryReactor* UnloadModel(grpc::CallbackServerContext* context,
                                        const v1::UnloadModelRequest*,
                                        v1::UnloadModelResponse*) override {
    return Unimplemented(env_, "UnloadModel", context);
  }
};

}  // namespace

std::unique_ptr<grpc::Service> MakeModelService(const RpcEnvironment* env) {
  return std::make_unique<ModelService>(env);
}

}  // namespace mmfree
