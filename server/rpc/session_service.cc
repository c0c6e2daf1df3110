#include "mmfree/v1/session.grpc.pb.h"
#include "server/rpc/services.h"
#include "server/rpc/unimplemented.h"

namespace mmfree {
namespace {

using Reactor = grpc::ServerUnaryReactor;
using Context = grpc::CallbackServerContext;

class SessionService final : public v1::SessionService::CallbackService {
 public:
  explicit SessionService(const RpcEnvironment* env) : env_(env) {}

  Reactor* CreateSession(Context* context, const v1::CreateSessionRequest*,
                         v1::CreateSessionResponse*) override {
    return Unimplemented(env_, "CreateSession", context);
  }
  Reactor* GetSession(Context* context, const v1::GetSessionRequest*,
                      v1::GetSessionResponse*) override {
    return Unimplemented(env_, "GetSession", context);
  }
  Reactor* ListSessions(Context* context, const v1::ListSessionsRequest*,
                        v1::ListSessionsResponse*) override {
    return Unimplemented(env_, "ListSessions", context);
  }
  Reactor* ForkSession(Context* context, const v1::ForkSessionRequest*,
                       v1::ForkSessionResponse*) override {
    return Unimplemented(env_, "ForkSession", context);
  }
  Reactor* RewindSession(Context* context, const v1::RewindSessionRequest*,
                         v1::RewindSessionResponse*) override {
    return Unimplemented(env_, "RewindSession", context);
  }
  Reactor* ExportSession(Context* context, const v1::ExportSessionRequest*,
                         v1::ExportSessionResponse*) override {
    return Unimplemented(env_, "ExportSession", context);
  }
  Reactor* ImportSession(Context* context, const v1::ImportSessionRequest*,
                         v1::ImportSessionResponse*) override {
    return Unimplemented(env_, "ImportSession", context);
  }
  Reactor* DeleteSession(Context* context, const v1::DeleteSessionRequest*,
                         v1::DeleteSessionResponse*) override {
    return Unimplemented(env_, "DeleteSession", context);
  }

 private:
  const RpcEnvironment* const env_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeSessionService(const RpcEnvironment* env) {
  return std::make_unique<SessionService>(env);
}

}  // namespace mmfree
