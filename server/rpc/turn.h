// A Generate that goes on from a context, leaves one, or both: a turn of a session, or a state that
// the caller keeps.
#ifndef MMFREE_SERVER_RPC_TURN_H_
#define MMFREE_SERVER_RPC_TURN_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "mmfree/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/rpc/environment.h"
#include "server/rpc/generation_stream.h"
#include "server/rpc/output_text.h"
#include "server/scheduler/request.h"
#include "server/sessions/session.h"
#include "server/sessions/session_table.h"

namespace mmfree {

// What a state of this engine's model must fit.
ModelShape ShapeOf(const Engine& engine);

// The context after `start`, what was fed and what `final_state` says, all of its pending tokens
// included. Takes its state, which it reads when that is on a device: blocks, with its errors.
absl::StatusOr<SessionState> NextState(const SessionState& start, absl::Span<const int32_t> prompt,
                                       FinalState* final_state);

// Its destruction without Finish leaves a session as it was. Used by one thread at a time.
class Turn {
 public:
  // Whether a request needs one.
  static bool Needed(const v1::GenerateRequest& request);

  // Takes the session, when there is one, and loads the state. Blocks on the store. Errors as
  // Generate's. `request` must outlive the turn.
  static absl::StatusOr<std::unique_ptr<Turn>> Begin(const RpcEnvironment& env,
                                                     const std::string& caller,
                                                     const v1::GenerateRequest& request);

  // Of the session's or the state's model.
  Engine* engine() const { return engine_; }
  const SessionState& start() const { return start_; }

  // Makes `request`, whose prompt starts with start()'s pending tokens, go on from the state.
  // `stop` is its stop condition, null without one.
  void Attach(GenerationRequest* request, std::shared_ptr<const TextStop> stop);

  // The turn of one of several candidates that go on from what this one's prompt, which was
  // attached, led to. Without a session.
  std::unique_ptr<Turn> Fork(const FinalState& after_prompt) const;

  // Calls `callback` when the session is deleted during the turn.
  void OnDelete(std::function<void()> callback);
  bool deleted() const { return turn_ != nullptr && turn_->deleted(); }

  // The generation has ended well: commits to the session and puts its turn, and the state when it
  // was asked for, into `finished`. Blocks on the store. On an error nothing was committed, unless
  // the store is UNAVAILABLE and cannot tell.
  absl::Status Finish(v1::GenerationFinished* finished);

 private:
  Turn(const RpcEnvironment& env, const v1::GenerateRequest& request)
      : env_(env), request_(request) {}

  absl::Status BeginSession(const std::string& caller);
  absl::Status BeginState();
  // Leaves of the pending tokens what is part of the text that a stop string cut.
  absl::Status Cut(std::vector<int32_t>* pending) const;

  const RpcEnvironment& env_;
  const v1::GenerateRequest& request_;
  Engine* engine_ = nullptr;
  std::unique_ptr<SessionTurn> turn_;  // null without a session
  SessionState start_;
  std::vector<int32_t> prompt_;
  std::shared_ptr<FinalState> final_state_;
  std::shared_ptr<const TextStop> stop_;
};

// Finishes the turn between the generation's end and the last event, on the session threads.
class TurnWriter final : public EventWriter {
 public:
  // `env` and `out` outlive the RPC.
  TurnWriter(const RpcEnvironment& env, std::unique_ptr<Turn> turn, EventWriter* out)
      : env_(env), out_(out), turn_(std::move(turn)) {}

  void Write(const v1::GenerateResponse& event) override { out_->Write(event); }
  void WriteLast(const v1::GenerateResponse& event) override;
  void Finish(const absl::Status& status) override;

 private:
  const RpcEnvironment& env_;
  EventWriter* const out_;
  std::unique_ptr<Turn> turn_;
  v1::GenerateResponse last_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_TURN_H_
