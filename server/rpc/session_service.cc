#include <functional>
#include <utility>

#include "mmfree/v1/session.grpc.pb.h"
#include "server/rpc/create_session_handler.h"
#include "server/rpc/malformed.h"
#include "server/rpc/services.h"
#include "server/rpc/session_handlers.h"
#include "server/rpc/unary_call.h"

namespace mmfree {
namespace {

using Reactor = grpc::ServerUnaryReactor;
using Context = grpc::CallbackServerContext;

class SessionService final : public ParsingService<v1::SessionService::CallbackService> {
 public:
  explicit SessionService(const RpcEnvironment* env) : ParsingService(env) {
    Answer(0, "CreateSession", &SessionService::CreateSession);
    Answer(1, "GetSession", &SessionService::GetSession);
    Answer(2, "ListSessions", &SessionService::ListSessions);
    Answer(3, "ForkSession", &SessionService::ForkSession);
    Answer(4, "RewindSession", &SessionService::RewindSession);
    Answer(5, "ExportSession", &SessionService::ExportSession);
    Answer(6, "ImportSession", &SessionService::ImportSession);
    Answer(7, "DeleteSession", &SessionService::DeleteSession);
  }

  Reactor* CreateSession(Context* context, const v1::CreateSessionRequest* request,
                         v1::CreateSessionResponse* response) override {
    return HandleCreateSession(env_, context, request, response);
  }
  Reactor* GetSession(Context* context, const v1::GetSessionRequest* request,
                      v1::GetSessionResponse* response) override {
    return Run("GetSession", context, HandleGetSession, request, response);
  }
  Reactor* ListSessions(Context* context, const v1::ListSessionsRequest* request,
                        v1::ListSessionsResponse* response) override {
    return Run("ListSessions", context, HandleListSessions, request, response);
  }
  Reactor* ForkSession(Context* context, const v1::ForkSessionRequest* request,
                       v1::ForkSessionResponse* response) override {
    return Run("ForkSession", context, HandleForkSession, request, response);
  }
  Reactor* RewindSession(Context* context, const v1::RewindSessionRequest* request,
                         v1::RewindSessionResponse* response) override {
    return Run("RewindSession", context, HandleRewindSession, request, response);
  }
  Reactor* ExportSession(Context* context, const v1::ExportSessionRequest* request,
                         v1::ExportSessionResponse* response) override {
    return Run("ExportSession", context, HandleExportSession, request, response);
  }
  Reactor* ImportSession(Context* context, const v1::ImportSessionRequest* request,
                         v1::ImportSessionResponse* response) override {
    return Run("ImportSession", context, HandleImportSession, request, response);
  }
  Reactor* DeleteSession(Context* context, const v1::DeleteSessionRequest* request,
                         v1::DeleteSessionResponse* response) override {
    return Run("DeleteSession", context, HandleDeleteSession, request, response);
  }

 private:
  template <typename Request, typename Response>
  Reactor* Run(absl::string_view method, Context* context,
               absl::Status (*handle)(const RpcEnvironment&, const std::string&, const Request&,
                                      Response*),
               const Request* request, Response* response) {
    return RunOnSessionThread(env_, method, context,
                              [this, handle, request, response](const std::string& caller) {
                                return handle(*env_, caller, *request, response);
                              });
  }
};

}  // namespace

std::unique_ptr<grpc::Service> MakeSessionService(const RpcEnvironment* env) {
  return std::make_unique<SessionService>(env);
}

}  // namespace mmfree
