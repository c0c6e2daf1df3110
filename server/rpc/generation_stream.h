// One Generate stream between the engine, which delivers tokens, and the transport, which takes one
// message at a time.
#ifndef MMFREE_SERVER_RPC_GENERATION_STREAM_H_
#define MMFREE_SERVER_RPC_GENERATION_STREAM_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "mmfree/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/rpc/output_text.h"
#include "server/scheduler/request.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

// The sending half of a streaming RPC. The stream calls it from any thread but never concurrently:
// Write again only after OnWriteDone, and WriteLast or Finish once, as the last call.
class EventWriter {
 public:
  virtual ~EventWriter() = default;
  // `event` stays valid until OnWriteDone.
  virtual void Write(const v1::GenerateResponse& event) = 0;
  // Writes the last event and ends the RPC with OK. `event` stays valid until the RPC is done.
  virtual void WriteLast(const v1::GenerateResponse& event) = 0;
  virtual void Finish(const absl::Status& status) = 0;
};

// What a transport tells of a streaming RPC. Thread-safe.
class EventSource {
 public:
  virtual ~EventSource() = default;
  // The write in flight is done. `ok` is false when the client is gone.
  virtual void OnWriteDone(bool ok) = 0;
  // The client is gone or its deadline has passed. `deadline_passed`: the engine ends the request
  // on its own with DEADLINE_EXCEEDED, which a cancel would turn into CANCELLED.
  virtual void OnCancel(bool deadline_passed) = 0;
};

// Tokens that arrive while a write is in flight leave together in the next message, so memory is
// bounded by what the engine lets a stream lag behind (backlog()).
//
// Thread-safe. Held by the engine (as the sink) and by the transport; whichever of them lets go
// last destroys it. The writer is not touched after the call that ends the RPC.
class GenerationStream final : public GenerationSink, public EventSource {
 public:
  struct Options {
    std::string request_id;
    uint64_t seed = 0;
    bool return_token_ids = false;
    bool logprobs = false;            // of each token
    bool cumulative_logprob = false;  // of all of them, in `finished`; also with logprobs
    // What is sent of the prompt before the first token.
    bool prompt_logprobs = false;  // as the request
    bool echo = false;
    size_t input_begin = 0;  // tokens in front of the input, which the context left to be fed
    bool input_starts_text = true;
    int64_t context_tokens = 0;  // fed before, in the context
    bool starts_text = true;     // the output is the start of all text
    bool announce = true;        // send `started`
    uint32_t candidate = 0;
    std::string constraint_field;  // what errors name
    OutputText::Options text;
  };

  // `engine` and `writer` outlive the RPC. `prompt` is read during construction only.
  GenerationStream(Options options, Engine* engine, absl::Span<const int32_t> prompt,
                   EventWriter* writer);

  // Submits `request` with `self` as the sink. On an error the RPC is finished with it.
  static void Start(const std::shared_ptr<GenerationStream>& self, GenerationRequest request);

  // From the engine.
  void OnPromptLogprobs(absl::Span<const float> logprobs,
                        absl::Span<const TokenAlternatives> top) override;
  void OnTokens(absl::Span<const SampledToken> tokens) override;
  void OnFinished(const absl::StatusOr<GenerationResult>& result) override;
  size_t backlog() const override { return backlog_.load(std::memory_order_relaxed); }

  // From the transport.
  void OnWriteDone(bool ok) override;
  void OnCancel(bool deadline_passed) override;

 private:
  // Sends what is next unless a write is in flight or there is nothing to send.
  void Pump();
  // Gives up what busy_ stands for, after the tokens in flight were taken.
  void Release(bool client_gone);
  // The rest, while busy: sends the end of the stream, or what must come before it.
  void End(const absl::StatusOr<GenerationResult>& result, bool client_gone);
  void MakeStarted();
  // Whether an event of the prompt is the next to be sent, once started is.
  bool PromptIsNext() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MakePrompt();
  // Makes an event of the tokens in flight; false when there is nothing to say yet.
  bool MakeDelta();

  const Options options_;
  Engine* const engine_;
  EventWriter* const writer_;
  const int64_t prompt_tokens_;
  int64_t cached_tokens_ = 0;          // of the prompt, when it was submitted
  const std::vector<int32_t> prompt_;  // what prompt events are made of; empty without them

  std::atomic<size_t> backlog_{0};

  absl::Mutex mu_;
  bool admitted_ ABSL_GUARDED_BY(mu_) = false;
  RequestHandle handle_ ABSL_GUARDED_BY(mu_) = 0;
  bool client_gone_ ABSL_GUARDED_BY(mu_) = false;
  bool cancel_engine_ ABSL_GUARDED_BY(mu_) = false;
  // Those of the prompt have come. The values are read without the lock after that.
  bool has_prompt_logprobs_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<float> prompt_logprobs_;
  std::vector<TokenAlternatives> prompt_top_;  // empty: not wanted
  std::vector<SampledToken> pending_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::StatusOr<GenerationResult>> result_ ABSL_GUARDED_BY(mu_);
  // A write is in flight, a thread is making one, or the RPC has ended: whoever sets it owns the
  // members below and the writer.
  bool busy_ ABSL_GUARDED_BY(mu_) = false;

  bool started_sent_;   // or not to be sent
  size_t prompt_sent_;  // tokens of prompt_, with those before the input
  StreamDecoder prompt_decoder_;
  OutputText text_;
  std::vector<SampledToken> in_flight_;
  double cumulative_logprob_ = 0.0;
  v1::GenerateResponse event_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_GENERATION_STREAM_H_
