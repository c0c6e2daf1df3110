// The session RPCs that only need the table. Each validates its request, fills in the response and
// returns the RPC's status; they block on the store. Thread-safe.
#ifndef MMFREE_SERVER_RPC_SESSION_HANDLERS_H_
#define MMFREE_SERVER_RPC_SESSION_HANDLERS_H_

#include <string>

#include "absl/status/status.h"
#include "mmfree/v1/session.pb.h"
#include "server/rpc/environment.h"

namespace mmfree {

absl::Status HandleGetSession(const RpcEnvironment& env, const std::string& caller,
                              const v1::GetSessionRequest& request,
                              v1::GetSessionResponse* response);
absl::Status HandleListSessions(const RpcEnvironment& env, const std::string& caller,
                                const v1::ListSessionsRequest& request,
                                v1::ListSessionsResponse* response);
absl::Status HandleForkSession(const RpcEnvironment& env, const std::string& caller,
                               const v1::ForkSessionRequest& request,
                               v1::ForkSessionResponse* response);
absl::Status HandleRewindSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::RewindSessionRequest& request,
                                 v1::RewindSessionResponse* response);
absl::Status HandleExportSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::ExportSessionRequest& request,
                                 v1::ExportSessionResponse* response);
absl::Status HandleImportSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::ImportSessionRequest& request,
                                 v1::ImportSessionResponse* response);
absl::Status HandleDeleteSession(const RpcEnvironment& env, const std::string& caller,
                                 const v1::DeleteSessionRequest& request,
                                 v1::DeleteSessionResponse* response);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SESSION_HANDLERS_H_
