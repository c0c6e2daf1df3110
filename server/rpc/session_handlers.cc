#include "server/rpc/session_handlers.h"

#include <algorithm>
#include <optional>

#include "absl/status/statusor.h"
#include "server/base/status_macros.h"
#include "server/rpc/session_conversion.h"
#include "server/rpc/status.h"
#include "server/rpc/turn.h"
#include "server/sessions/checkpoint.h"
#include "server/sessions/session_table.h"

namespace mmfree {
namespace {

constexpr int32_t kDefaultPageSize = 100;
constexpr int32_t kMaxPageSize = 1000;

template <typename Request>
std::optional<uint64_t> TurnOf(const Request& request) {
  return request.has_turn() ? std::optional<uint64_t>(request.turn()) : std::nullopt;
}

}  // namespace

absl::Status HandleGetSession(const RpcEnvironment& env, const std::string& caller,
                              const v1::GetSessionRequest& request,
                              v1::GetSessionResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          ExistingName(caller, request.session_id(), "session_id"));
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo info, sessions->Get(name));
  ToProto(info, response->mutable_session());
  return absl::OkStatus();
}

absl::Status HandleListSessions(const RpcEnvironment& env, const std::string& caller,
                                const v1::ListSessionsRequest& request,
                                v1::ListSessionsResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  if (request.page_size() < 0) return InvalidField("page_size", "must not be negative");
  if (!request.owner().empty() && request.owner() != caller) {
    return absl::PermissionDeniedError("owner is not the caller");
  }
  const int32_t page_size =
      request.page_size() == 0 ? kDefaultPageSize : std::min(request.page_size(), kMaxPageSize);
  absl::StatusOr<SessionTable::Page> page =
      sessions->List(caller, request.model(), page_size, request.page_token());
  if (absl::IsInvalidArgument(page.status())) {
    return InvalidField("page_token", page.status().message());
  }
  MMFREE_RETURN_IF_ERROR(page.status());
  for (const SessionInfo& info : page->sessions) ToProto(info, response->add_sessions());
  response->set_next_page_token(page->next_page_token);
  return absl::OkStatus();
}

absl::Status HandleForkSession(const RpcEnvironment& env, const std::string& caller,
                               const v1::ForkSessionRequest& request,
                               v1::ForkSessionResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  MMFREE_ASSIGN_OR_RETURN(const SessionName source,
                          ExistingName(caller, request.session_id(), "session_id"));
  MMFREE_ASSIGN_OR_RETURN(const SessionName copy,
                          NewName(caller, request.new_session_id(), "new_session_id"));
  MMFREE_ASSIGN_OR_RETURN(const std::optional<absl::Duration> ttl,
                          TtlOf(request.has_ttl(), request.ttl()));
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo info,
                          sessions->Fork(source, TurnOf(request), copy, ttl));
  ToProto(info, response->mutable_session());
  return absl::OkStatus();
}

absl::Status HandleRewindSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::RewindSessionRequest& request,
                                 v1::RewindSessionResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          ExistingName(caller, request.session_id(), "session_id"));
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo info, sessions->Rewind(name, request.turn()));
  ToProto(info, response->mutable_session());
  return absl::OkStatus();
}

absl::Status HandleExportSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::ExportSessionRequest& request,
                                 v1::ExportSessionResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          ExistingName(caller, request.session_id(), "session_id"));
  if (!v1::StateDtype_IsValid(request.dtype())) {
    return InvalidField("dtype", "must be a value of StateDtype");
  }
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo session, sessions->Get(name));
  MMFREE_ASSIGN_OR_RETURN(const Engine* const engine, EngineOfSession(env, session, ""));
  MMFREE_ASSIGN_OR_RETURN(const SessionTable::ReadResult read,
                          sessions->Read(name, TurnOf(request), ShapeOf(*engine)));
  *response->mutable_checkpoint() =
      EncodeCheckpoint(read.state, read.session.model_digest, request.dtype(), sessions->key());
  ToProto(read.session, response->mutable_session());
  return absl::OkStatus();
}

absl::Status HandleImportSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::ImportSessionRequest& request,
                                 v1::ImportSessionResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  if (!request.has_checkpoint()) return InvalidField("checkpoint", "required");
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          NewName(caller, request.session_id(), "session_id"));
  MMFREE_ASSIGN_OR_RETURN(const std::optional<absl::Duration> ttl,
                          TtlOf(request.has_ttl(), request.ttl()));
  MMFREE_ASSIGN_OR_RETURN(const std::string digest, CheckpointModelDigest(request.checkpoint()));
  MMFREE_ASSIGN_OR_RETURN(const Engine* const engine,
                          EngineOfCheckpoint(env, digest, request.model()));
  MMFREE_ASSIGN_OR_RETURN(
      const SessionState state,
      DecodeCheckpoint(request.checkpoint(), ShapeOf(*engine), sessions->key()));
  MMFREE_ASSIGN_OR_RETURN(const SessionInfo info,
                          sessions->Create(name, engine->model_name(), digest, state, ttl));
  ToProto(info, response->mutable_session());
  return absl::OkStatus();
}

absl::Status HandleDeleteSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::DeleteSessionRequest& request,
                                 v1::DeleteSessionResponse*) {
  MMFREE_ASSIGN_OR_RETURN(SessionTable* const sessions, SessionsOf(env));
  MMFREE_ASSIGN_OR_RETURN(const SessionName name,
                          ExistingName(caller, request.session_id(), "session_id"));
  return sessions->Delete(name);
}

}  // namespace mmfree
