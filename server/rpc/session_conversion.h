// What the RPCs about sessions share: names, models, protos.
#ifndef MMFREE_SERVER_RPC_SESSION_CONVERSION_H_
#define MMFREE_SERVER_RPC_SESSION_CONVERSION_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "mmfree/v1/session.pb.h"
#include "server/engine/engine.h"
#include "server/rpc/environment.h"
#include "server/sessions/session.h"
#include "server/sessions/session_key.h"
#include "server/sessions/session_table.h"

namespace mmfree {

// UNIMPLEMENTED when the server keeps no sessions.
absl::StatusOr<SessionTable*> SessionsOf(const RpcEnvironment& env);
// Signs and checks states; empty when the server keeps no sessions.
const SessionKey& KeyOf(const RpcEnvironment& env);

// INVALID_ARGUMENT names `field` unless `id` can name a session; a new one may be empty.
absl::StatusOr<SessionName> ExistingName(const std::string& caller, const std::string& id,
                                         absl::string_view field);
absl::StatusOr<SessionName> NewName(const std::string& caller, const std::string& id,
                                    absl::string_view field);

// Absent: nullopt. INVALID_ARGUMENT unless it is positive and in the range of the type.
absl::StatusOr<std::optional<absl::Duration>> TtlOf(bool given,
                                                    const google::protobuf::Duration& ttl);

// The engine that serves the session's model, by digest. INVALID_ARGUMENT: `model`, when not empty,
// is another one; FAILED_PRECONDITION: it is not served.
absl::StatusOr<Engine*> EngineOfSession(const RpcEnvironment& env, const SessionInfo& session,
                                        const std::string& model);
// The engine named `model` (empty: the one with that digest). NOT_FOUND, FAILED_PRECONDITION.
absl::StatusOr<Engine*> EngineOfCheckpoint(const RpcEnvironment& env, const std::string& digest,
                                           const std::string& model);

void ToProto(const SessionInfo& info, v1::Session* out);

// Gives a store's UNAVAILABLE its RetryInfo.
absl::Status WithStoreRetryDelay(absl::Status status);
// RESOURCE_EXHAUSTED + RetryInfo: too many calls wait for the store.
absl::Status SessionThreadsBusy();

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SESSION_CONVERSION_H_
