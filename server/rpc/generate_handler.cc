#include "server/rpc/generate_handler.h"

#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/rpc/call.h"
#include "server/rpc/conversion.h"
#include "server/rpc/generation_stream.h"
#include "server/rpc/validation.h"

namespace mmfree {
namespace {

// Owns itself: gRPC calls OnDone last. Until the stream exists nothing but the thread that prepares
// it may finish the RPC, so an early OnCancel is only noted.
class GenerateReactor final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                              private EventWriter {
 public:
  GenerateReactor(const RpcEnvironment* env, grpc::CallbackServerContext* context,
                  const v1::GenerateRequest* request)
      : call_(env, "Generate", *context), request_(request) {}

  void Start() {
    absl::Status status = call_.admission();
    absl::StatusOr<Engine*> engine = call_.env().models->Find(request_->model());
    if (status.ok()) status = engine.status();
    if (status.ok()) {
      status = ValidateGenerate(*request_, (*engine)->model().config(), call_.env().limits);
    }
    if (status.ok()) {
      status = call_.Run(request_->text().size(), [this, engine = *engine] { Submit(engine); });
      // The RPC may be over, and this object gone, when the work was done here.
      if (status.ok()) return;
    }
    Finish(status);
  }

  void OnWriteDone(bool ok) override { stream()->OnWriteDone(ok); }

  void OnCancel() override {
    const bool deadline_passed = call_.deadline_passed();
    std::shared_ptr<GenerationStream> stream;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      stream = stream_;
    }
    if (stream != nullptr) stream->OnCancel(deadline_passed);
  }

  void OnDone() override { delete this; }

 private:
  void Submit(Engine* engine) {
    absl::StatusOr<GenerationRequest> request =
        ToGenerationRequest(*request_, *engine, call_.env().limits);
    if (!request.ok()) {
      Finish(request.status());
      return;
    }
    request->deadline = call_.deadline();
    request->caller = call_.caller();
    const v1::ResponseOptions& response = request_->response();
    const GenerationStream::Options options = {.request_id = request->request_id,
                                               .seed = request->sampling.seed,
                                               .return_token_ids = response.return_token_ids(),
                                               .logprobs = response.logprobs(),
                                               .prompt_logprobs = response.prompt_logprobs(),
                                               .echo = response.echo(),
                                               .text = ToTextOptions(request_->stopping())};
    if (options.text.stop_strings != nullptr) {
      const Tokenizer& tokenizer = engine->tokenizer();
      request->stop_condition = std::make_shared<TextStop>(
          OutputText(&tokenizer, StartsText(tokenizer, request->prompt), options.text));
    }
    EventWriter* const writer = this;
    const auto stream =
        std::make_shared<GenerationStream>(options, engine, request->prompt, writer);
    bool cancelled;
    {
      absl::MutexLock lock(&mu_);
      cancelled = cancelled_;
      if (!cancelled) stream_ = stream;
    }
    if (cancelled) {
      Finish(call_.CancelStatus());
    } else {
      GenerationStream::Start(stream, *std::move(request));
    }
  }

  std::shared_ptr<GenerationStream> stream() {
    absl::MutexLock lock(&mu_);
    return stream_;
  }

  // EventWriter.
  void Write(const v1::GenerateResponse& event) override { StartWrite(&event); }
  void WriteLast(const v1::GenerateResponse& event) override {
    StartWriteAndFinish(&event, grpc::WriteOptions(), call_.Finish(absl::OkStatus()));
  }
  void Finish(const absl::Status& status) override {
    ServerWriteReactor::Finish(call_.Finish(status));
  }

  Call call_;
  const v1::GenerateRequest* const request_;
  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<GenerationStream> stream_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* HandleGenerate(const RpcEnvironment* env,
                                                               grpc::CallbackServerContext* context,
                                                               const v1::GenerateRequest* request) {
  auto* const reactor = new GenerateReactor(env, context, request);
  reactor->Start();
  return reactor;
}

}  // namespace mmfree
