#include "mmfree/v1/inference.grpc.pb.h"
#include "server/rpc/generate_handler.h"
#include "server/rpc/handlers.h"
#include "server/rpc/malformed.h"
#include "server/rpc/score_handler.h"
#include "server/rpc/services.h"
#include "server/rpc/unary_call.h"

namespace mmfree {
namespace {

class InferenceService final : public ParsingService<v1::InferenceService::CallbackService> {
 public:
  explicit InferenceService(const RpcEnvironment* env) : ParsingService(env) {
    Answer(0, "Generate", &InferenceService::Generate);
    Answer(1, "Score", &InferenceService::Score);
    Answer(2, "Tokenize", &InferenceService::Tokenize);
    Answer(3, "Detokenize", &InferenceService::Detokenize);
  }

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override {
    return HandleGenerate(env_, context, request);
  }

  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context,
                                  const v1::ScoreRequest* request,
                                  v1::ScoreResponse* response) override {
    return HandleScore(env_, context, request, response);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return RunUnary(
        env_, "Tokenize", context, DuringDrain::kRefuse, request->text().size(),
        [this, request, response] { return HandleTokenize(*env_, *request, response); });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return RunUnary(
        env_, "Detokenize", context, DuringDrain::kRefuse, request->token_ids_size(),
        [this, request, response] { return HandleDetokenize(*env_, *request, response); });
  }
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInferenceService(const RpcEnvironment* env) {
  return std::make_unique<InferenceService>(env);
}

}  // namespace mmfree
