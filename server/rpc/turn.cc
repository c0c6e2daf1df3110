#include "server/rpc/turn.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/rpc/conversion.h"
#include "server/rpc/session_conversion.h"
#include "server/rpc/status.h"
#include "server/sessions/checkpoint.h"

namespace mmfree {

ModelShape ShapeOf(const Engine& engine) {
  return {.digest = engine.model().digest(),
          .state_floats = engine.backend_info().state_floats,
          .vocab_size = engine.model().config().vocab_size};
}

namespace {

// What NextState is but for the state.
SessionState NextContext(const SessionState& start, absl::Span<const int32_t> prompt,
                         const FinalState& final_state) {
  SessionState next;
  next.token_count = start.token_count + final_state.fed;
  next.pending = final_state.pending;
  next.turn = start.turn;
  // The last tokens of: those before, the prompt, the output, without what is pending.
  std::vector<int32_t>& last = next.last_tokens;
  const std::vector<int32_t>& emitted = final_state.emitted;
  last.assign(emitted.begin(), emitted.end());
  const size_t wanted = kMaxLastTokens + next.pending.size();
  if (last.size() < wanted) {
    const size_t from_prompt = std::min(prompt.size(), wanted - last.size());
    last.insert(last.begin(), prompt.end() - static_cast<ptrdiff_t>(from_prompt), prompt.end());
  }
  last.resize(last.size() - std::min(last.size(), next.pending.size()));
  if (last.size() < kMaxLastTokens) {
    const size_t before = std::min(start.last_tokens.size(), kMaxLastTokens - last.size());
    last.insert(last.begin(), start.last_tokens.end() - static_cast<ptrdiff_t>(before),
                start.last_tokens.end());
  }
  if (last.size() > kMaxLastTokens) last.erase(last.begin(), last.end() - kMaxLastTokens);
  return next;
}

}  // namespace

absl::StatusOr<SessionState> NextState(const SessionState& start, absl::Span<const int32_t> prompt,
                                       FinalState* final_state) {
  SessionState next = NextContext(start, prompt, *final_state);
  next.state = std::move(final_state->state);
  next.device = std::move(final_state->device);
  if (next.device != nullptr) MMFREE_RETURN_IF_ERROR(next.device->Read(&next.state));
  return next;
}

bool Turn::Needed(const v1::GenerateRequest& request) {
  return request.context_case() != v1::GenerateRequest::CONTEXT_NOT_SET ||
         request.response().return_state();
}

absl::StatusOr<std::unique_ptr<Turn>> Turn::Begin(const RpcEnvironment& env,
                                                  const std::string& caller,
                                                  const v1::GenerateRequest& request) {
  std::unique_ptr<Turn> turn(new Turn(env, request));
  switch (request.context_case()) {
    case v1::GenerateRequest::kSessionId:
      MMFREE_RETURN_IF_ERROR(turn->BeginSession(caller));
      break;
    case v1::GenerateRequest::kState:
      MMFREE_RETURN_IF_ERROR(turn->BeginState());
      break;
    case v1::GenerateRequest::CONTEXT_NOT_SET:
      MMFREE_ASSIGN_OR_RETURN(turn->engine_, env.models->Find(request.model()));
      break;
  }
  return turn;
}

absl::Status Turn::BeginSession(const std::string& caller) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env_));
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          ExistingName(caller, request_.session_id(), "session_id"));
  std::optional<uint64_t> expected;
  if (request_.has_expected_turn()) expected = request_.expected_turn();
  MMFREE_ASSIGN_OR_RETURN(turn_, sessions->Begin(name, expected));
  MMFREE_ASSIGN_OR_RETURN(engine_, EngineOfSession(env_, turn_->session(), request_.model()));
  MMFREE_ASSIGN_OR_RETURN(start_, turn_->Load(ShapeOf(*engine_)));
  return absl::OkStatus();
}

absl::Status Turn::BeginState() {
  MMFREE_ASSIGN_OR_RETURN(const std::string digest, CheckpointModelDigest(request_.state()));
  MMFREE_ASSIGN_OR_RETURN(engine_, EngineOfCheckpoint(env_, digest, request_.model()));
  MMFREE_ASSIGN_OR_RETURN(start_,
                          DecodeCheckpoint(request_.state(), ShapeOf(*engine_), KeyOf(env_)));
  return absl::OkStatus();
}

void Turn::Attach(GenerationRequest* request, std::shared_ptr<const TextStop> stop) {
  stop_ = std::move(stop);
  prompt_ = request->prompt;
  final_state_ = std::make_shared<FinalState>();
  request->final_state = final_state_;
  request->final_on_device = true;
  request->first_position = static_cast<uint64_t>(start_.token_count);
  if (start_.device != nullptr) {
    request->device_state = std::move(start_.device);
  } else if (!start_.state.empty()) {
    request->initial_state = std::make_shared<const std::vector<float>>(std::move(start_.state));
  }
}

std::unique_ptr<Turn> Turn::Fork(const FinalState& after_prompt) const {
  std::unique_ptr<Turn> turn(new Turn(env_, request_));
  turn->engine_ = engine_;
  // The request brings the state itself.
  turn->start_ = NextContext(start_, prompt_, after_prompt);
  return turn;
}

void Turn::OnDelete(std::function<void()> callback) {
  if (turn_ != nullptr) turn_->OnDelete(std::move(callback));
}

// The tokens that the cut goes through are replaced by those of the part that is left, so that the
// context is what its reader saw, to the byte.
absl::Status Turn::Cut(std::vector<int32_t>* pending) const {
  const OutputText::Kept kept = stop_->text().kept();
  const int64_t held_from = final_state_->fed - static_cast<int64_t>(prompt_.size());
  pending->resize(static_cast<size_t>(kept.tokens - held_from));
  if (pending->size() + kept.rest.size() > kMaxPendingTokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the stop string leaves ", pending->size(),
                     " tokens that do not end at a character; a context can keep ",
                     kMaxPendingTokens, " that are not fed"));
  }
  if (kept.rest.empty()) return absl::OkStatus();
  // Where decoding drops the space of a dummy prefix there has to be one.
  MMFREE_ASSIGN_OR_RETURN(
      const std::vector<int32_t> rest,
      engine_->tokenizer().Encode(absl::StrCat(kept.drops_leading_space ? " " : "", kept.rest),
                                  {.bos = false, .continuation = true}));
  pending->insert(pending->end(), rest.begin(), rest.end());
  return absl::OkStatus();
}

absl::Status Turn::Finish(v1::GenerationFinished* finished) {
  MMFREE_ASSIGN_OR_RETURN(SessionState next, NextState(start_, prompt_, final_state_.get()));
  ++next.turn;
  if (finished->finish_reason() == v1::FINISH_REASON_STOP_STRING) {
    MMFREE_RETURN_IF_ERROR(Cut(&next.pending));
  }
  if (request_.response().return_state()) {
    *finished->mutable_state() = EncodeCheckpoint(next, engine_->model().digest(),
                                                  request_.response().state_dtype(), KeyOf(env_));
  }
  if (turn_ == nullptr) return absl::OkStatus();
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo session, turn_->Commit(std::move(next)));
  finished->set_session_turn(session.turn);
  return absl::OkStatus();
}

void TurnWriter::WriteLast(const v1::GenerateResponse& event) {
  last_ = event;
  const bool scheduled = env_.session_threads->Schedule([this] {
    const absl::Status status = turn_->Finish(last_.mutable_finished());
    // Before the caller can know: its next turn must find the session free.
    turn_.reset();
    if (status.ok()) {
      out_->WriteLast(last_);
    } else {
      out_->Finish(WithStoreRetryDelay(status));
    }
  });
  if (!scheduled) Finish(SessionThreadsBusy());
}

void TurnWriter::Finish(const absl::Status& status) {
  const bool deleted = turn_->deleted();
  turn_.reset();
  out_->Finish(deleted && absl::IsCancelled(status)
                   ? absl::AbortedError("the session was deleted during the turn")
                   : status);
}

}  // namespace mmfree
