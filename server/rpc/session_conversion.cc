#include "server/rpc/session_conversion.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/timestamp.pb.h"
#include "server/rpc/conversion.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/status.h"

namespace mmfree {
namespace {

constexpr absl::Duration kStoreRetryDelay = absl::Seconds(1);
// The last moment a Timestamp can name: the end of the year 9999.
constexpr int64_t kMaxTimestampSeconds = 253'402'300'799;
constexpr char kIdRule[] = "must be 1 to 128 characters of letters, digits, '.', '_', '-'";

void ToProto(absl::Time time, google::protobuf::Timestamp* out) {
  const int64_t seconds = absl::ToUnixSeconds(time);
  out->set_seconds(seconds);
  out->set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(time - absl::FromUnixSeconds(seconds))));
}

}  // namespace

absl::StatusOr<SessionTable*> SessionsOf(const RpcEnvironment& env) {
  if (env.sessions == nullptr) {
    return absl::UnimplementedError("this server keeps no sessions (--session_store=none)");
  }
  return env.sessions;
}

const SessionKey& KeyOf(const RpcEnvironment& env) {
  static const SessionKey* const none = new SessionKey;
  return env.sessions == nullptr ? *none : env.sessions->key();
}

absl::StatusOr<SessionName> ExistingName(const std::string& caller, const std::string& id,
                                         absl::string_view field) {
  if (!IsResourceName(id)) return InvalidField(field, kIdRule);
  return SessionName{caller, id};
}

absl::StatusOr<SessionName> NewName(const std::string& caller, const std::string& id,
                                    absl::string_view field) {
  if (!id.empty() && !IsResourceName(id)) return InvalidField(field, kIdRule);
  return SessionName{caller, id};
}

absl::StatusOr<std::optional<absl::Duration>> TtlOf(bool given,
                                                    const google::protobuf::Duration& ttl) {
  if (!given) return std::optional<absl::Duration>();
  constexpr int64_t kMaxSeconds = 315'576'000'000;
  constexpr int32_t kNanos = 1'000'000'000;
  const absl::Duration duration = absl::Seconds(ttl.seconds()) + absl::Nanoseconds(ttl.nanos());
  if (ttl.seconds() < 0 || ttl.seconds() > kMaxSeconds || ttl.nanos() < 0 ||
      ttl.nanos() >= kNanos || duration <= absl::ZeroDuration()) {
    return InvalidField("ttl", "must be a positive duration");
  }
  return std::optional<absl::Duration>(duration);
}

absl::StatusOr<Engine*> EngineOfSession(const RpcEnvironment& env, const SessionInfo& session,
                                        const std::string& model) {
  if (!model.empty()) {
    const absl::StatusOr<Engine*> engine = env.models->Find(model);
    if (!engine.ok() || (*engine)->model().digest() == session.model_digest) return engine;
    return InvalidField(
        "model", absl::StrCat("is not the session's, which is ", session.model, "; leave it out"));
  }
  for (Engine* const engine : env.models->engines()) {
    if (engine->model().digest() == session.model_digest) return engine;
  }
  return absl::FailedPreconditionError(absl::StrCat("the session's model, ", session.model,
                                                    " with digest ", session.model_digest,
                                                    ", is not served"));
}

absl::StatusOr<Engine*> EngineOfCheckpoint(const RpcEnvironment& env, const std::string& digest,
                                           const std::string& model) {
  if (!model.empty()) return env.models->Find(model);
  for (Engine* const engine : env.models->engines()) {
    if (engine->model().digest() == digest) return engine;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the checkpoint's model, with digest ", Quoted(digest), ", is not served"));
}

void ToProto(const SessionInfo& info, v1::Session* out) {
  out->set_id(info.name.id);
  out->set_owner(info.name.owner);
  out->set_model(info.model);
  out->set_model_digest(info.model_digest);
  out->set_token_count(info.token_count);
  out->set_turn(info.turn);
  out->set_oldest_turn(info.oldest_turn);
  out->set_busy(info.busy);
  out->set_tier(info.tier == SessionTier::kDevice ? v1::SESSION_TIER_DEVICE
                : info.tier == SessionTier::kHost ? v1::SESSION_TIER_HOST
                                                  : v1::SESSION_TIER_STORE);
  out->set_bytes(info.bytes);
  ToProto(info.create_time, out->mutable_create_time());
  ToProto(info.last_use_time, out->mutable_last_use_time());
  if (absl::ToUnixSeconds(info.expire_time) <= kMaxTimestampSeconds) {
    ToProto(info.expire_time, out->mutable_expire_time());
  }
}

absl::Status WithStoreRetryDelay(absl::Status status) {
  return absl::IsUnavailable(status) ? WithRetryDelay(std::move(status), kStoreRetryDelay) : status;
}

absl::Status SessionThreadsBusy() {
  return WithRetryDelay(
      absl::ResourceExhaustedError("too many calls are waiting for the session store"),
      kStoreRetryDelay);
}

}  // namespace mmfree
