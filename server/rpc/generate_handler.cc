#include "server/rpc/generate_handler.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/rpc/admissible.h"
#include "server/rpc/best_of.h"
#include "server/rpc/call.h"
#include "server/rpc/candidate_group.h"
#include "server/rpc/conversion.h"
#include "server/rpc/generation_stream.h"
#include "server/rpc/session_conversion.h"
#include "server/rpc/turn.h"
#include "server/rpc/validation.h"

namespace mmfree {
namespace {

// Owns itself: gRPC calls OnDone last. Until the source exists nothing but the thread that prepares
// it may finish the RPC, so an early OnCancel is only noted.
class GenerateReactor final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                              private EventWriter {
 public:
  GenerateReactor(const RpcEnvironment* env, grpc::CallbackServerContext* context,
                  const v1::GenerateRequest* request)
      : call_(env, "Generate", *context), request_(request) {}

  void Start() {
    absl::Status status = call_.admission();
    if (status.ok() && Turn::Needed(*request_)) {
      if (call_.env().session_threads->Schedule([this] { BeginTurn(); })) return;
      status = SessionThreadsBusy();
    }
    absl::StatusOr<Engine*> engine = call_.env().models->Find(request_->model());
    if (status.ok()) status = engine.status();
    if (status.ok()) {
      status = ValidateGenerate(*request_, (*engine)->model().config(), call_.env().limits);
    }
    if (status.ok()) {
      // Compiling a constraint takes as long as tokenizing a long text.
      const size_t compiling = request_->has_constraint() ? kInlineTextBytes + 1 : 0;
      status = call_.Run(request_->text().size() + compiling,
                         [this, engine = *engine] { Submit(engine, nullptr); });
      // The RPC may be over, and this object gone, when the work was done here.
      if (status.ok()) return;
    }
    Finish(status);
  }

  void OnWriteDone(bool ok) override { source()->OnWriteDone(ok); }

  void OnCancel() override {
    const bool deadline_passed = call_.deadline_passed();
    std::shared_ptr<EventSource> source;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      source = source_;
    }
    if (source != nullptr) source->OnCancel(deadline_passed);
  }

  void OnDone() override { delete this; }

 private:
  // On a session thread, which also tokenizes.
  void BeginTurn() {
    absl::StatusOr<std::unique_ptr<Turn>> turn =
        Turn::Begin(call_.env(), call_.caller(), *request_);
    absl::Status status = turn.status();
    if (status.ok()) {
      status = ValidateGenerate(*request_, (*turn)->engine()->model().config(), call_.env().limits);
    }
    if (status.ok()) {
      Engine* const engine = (*turn)->engine();
      Submit(engine, *std::move(turn));
      return;
    }
    // The session is free before the caller can know.
    if (turn.ok()) turn->reset();
    Finish(WithStoreRetryDelay(status));
  }

  void Submit(Engine* engine, std::unique_ptr<Turn> turn) {
    absl::StatusOr<GenerationRequest> request = ToGenerationRequest(
        *request_, *engine, call_.env().limits, turn == nullptr ? SessionState() : turn->start());
    absl::Status status = request.status();
    if (status.ok()) {
      status = CheckPromptAdmissible(*engine, request_->has_token_ids() ? "token_ids" : "text",
                                     static_cast<int64_t>(request->prompt.size()));
    }
    const uint32_t candidates = std::max(request_->candidates(), 1u);
    const uint32_t made = std::max(request_->best_of(), candidates);
    if (status.ok()) {
      status = CheckAdmissible(*engine, made > candidates ? "best_of" : "candidates", made);
    }
    if (!status.ok()) {
      turn.reset();
      Finish(status);
      return;
    }
    request->deadline = call_.deadline();
    request->caller = call_.caller();
    const bool starts_text = (turn == nullptr || turn->start().token_count == 0) &&
                             StartsText(engine->tokenizer(), request->prompt);
    const bool continues = turn != nullptr && turn->start().context_tokens() > 0;
    const int64_t context_tokens = turn == nullptr ? 0 : turn->start().token_count;
    const size_t pending_tokens = turn == nullptr ? 0 : turn->start().pending.size();
    const v1::ResponseOptions& response = request_->response();
    const GenerationStream::Options options = {
        .request_id = request->request_id,
        .seed = request->sampling.seed,
        .return_token_ids = response.return_token_ids(),
        .logprobs = response.logprobs(),
        .cumulative_logprob = request_->has_best_of(),
        .prompt_logprobs = response.prompt_logprobs(),
        .echo = response.echo(),
        .input_begin = pending_tokens,
        .input_starts_text = !continues,
        .context_tokens = context_tokens,
        .starts_text = starts_text,
        .constraint_field = ConstraintField(request_->constraint()),
        .text = ToTextOptions(request_->stopping())};
    std::shared_ptr<TextStop> stop;
    if (options.text.stop_strings != nullptr) {
      stop =
          std::make_shared<TextStop>(OutputText(&engine->tokenizer(), starts_text, options.text));
      request->stop_condition = stop;
    }
    EventWriter* const self = this;
    if (made > 1) {
      // There is no session: the turn is the state to go on from, and one for each to return.
      CandidateGroup::Prepare prepare;
      if (turn != nullptr) turn->Attach(&*request, nullptr);
      if (response.return_state()) {
        prepare = [env = &call_.env(), turn = std::shared_ptr<const Turn>(std::move(turn)), stop](
                      const FinalState& after_prompt, GenerationRequest* request,
                      EventWriter* out) -> std::unique_ptr<EventWriter> {
          std::shared_ptr<TextStop> own;
          if (stop != nullptr) own = std::make_shared<TextStop>(*stop);
          request->stop_condition = own;
          std::unique_ptr<Turn> fork = turn->Fork(after_prompt);
          fork->Attach(request, own);
          return std::make_unique<TurnWriter>(*env, std::move(fork), out);
        };
      }
      turn.reset();
      const auto best =
          made > candidates ? std::make_shared<BestOf>(made, candidates, self) : nullptr;
      EventWriter* const writer = best != nullptr ? best.get() : self;
      const auto group = std::make_shared<CandidateGroup>(
          made, options, engine, *std::move(request), writer, std::move(prepare));
      if (best != nullptr) best->SetSource(group);
      if (Publish(best != nullptr ? std::shared_ptr<EventSource>(best) : group)) {
        group->Start();
      } else {
        Finish(call_.CancelStatus());
      }
      return;
    }
    EventWriter* writer = self;
    Turn* const attached = turn.get();
    if (turn != nullptr) {
      turn->Attach(&*request, stop);
      turn_writer_ = std::make_unique<TurnWriter>(call_.env(), std::move(turn), self);
      writer = turn_writer_.get();
    }
    const auto stream =
        std::make_shared<GenerationStream>(options, engine, request->prompt, writer);
    if (!Publish(stream)) {
      writer->Finish(call_.CancelStatus());
      return;
    }
    if (attached != nullptr) {
      attached->OnDelete([weak = std::weak_ptr<GenerationStream>(stream)] {
        if (const auto running = weak.lock()) running->OnCancel(/*deadline_passed=*/false);
      });
    }
    GenerationStream::Start(stream, *std::move(request));
  }

  // False when the RPC was cancelled before.
  bool Publish(std::shared_ptr<EventSource> source) {
    absl::MutexLock lock(&mu_);
    if (!cancelled_) source_ = std::move(source);
    return !cancelled_;
  }

  std::shared_ptr<EventSource> source() {
    absl::MutexLock lock(&mu_);
    return source_;
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
  std::unique_ptr<TurnWriter> turn_writer_;  // null without a context
  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<EventSource> source_ ABSL_GUARDED_BY(mu_);
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
