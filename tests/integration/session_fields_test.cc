// Every field of every request of SessionService and ModelService over a real server.
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "mmfree/v1/model.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/integration/proto_fields.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using Sessions = v1::SessionService::Stub;

constexpr auto kOk = grpc::StatusCode::OK;
constexpr auto kNotFound = grpc::StatusCode::NOT_FOUND;
constexpr auto kUnimplemented = grpc::StatusCode::UNIMPLEMENTED;
constexpr char kPrompt[] = "Once upon a time there was an old woman who lived with her only son.";

class SessionFieldsTest : public LiveServer {
 protected:
  void SetUp() override { Start({}); }

  void Start(const std::vector<std::string>& flags) {
    StartServer(flags);
    sessions_ = v1::SessionService::NewStub(channel_);
  }

  template <typename Stub, typename Response, typename Request>
  static grpc::StatusCode Call(Stub* stub,
                               grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                            Response*),
                               const Request& request, Response* response) {
    grpc::ClientContext context;
    return (stub->*method)(&context, request, response).error_code();
  }

  v1::CreateSessionRequest New(const std::string& id) const {
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    return request;
  }
  grpc::StatusCode Create(const v1::CreateSessionRequest& request,
                          v1::Session* session = nullptr) const {
    v1::CreateSessionResponse response;
    const grpc::StatusCode code =
        Call(sessions_.get(), &Sessions::CreateSession, request, &response);
    if (session != nullptr) *session = response.session();
    return code;
  }
  v1::Session Created(const v1::CreateSessionRequest& request) const {
    v1::Session session;
    EXPECT_EQ(Create(request, &session), kOk);
    return session;
  }
  // A session of two turns, one token each.
  void MakeTurns(const std::string& id) const {
    Created(New(id));
    for (int turn = 0; turn < 2; ++turn) {
      v1::GenerateRequest request = GreedyRequest("Once", 1);
      request.set_session_id(id);
      ASSERT_TRUE(Generate(request).status.ok());
    }
  }
  grpc::StatusCode Get(const std::string& id, v1::Session* session = nullptr) const {
    v1::GetSessionRequest request;
    request.set_session_id(id);
    v1::GetSessionResponse response;
    const grpc::StatusCode code = Call(sessions_.get(), &Sessions::GetSession, request, &response);
    if (session != nullptr) *session = response.session();
    return code;
  }
  // Seconds from a session's last use to its end.
  static int64_t Ttl(const v1::Session& session) {
    return session.expire_time().seconds() - session.last_use_time().seconds();
  }
  v1::ExportSessionResponse Export(const v1::ExportSessionRequest& request,
                                   grpc::StatusCode expected = kOk) const {
    v1::ExportSessionResponse response;
    EXPECT_EQ(Call(sessions_.get(), &Sessions::ExportSession, request, &response), expected);
    return response;
  }
  v1::ExportSessionRequest ExportOf(const std::string& id) const {
    v1::ExportSessionRequest request;
    request.set_session_id(id);
    return request;
  }

  Exercises CreateFields() const {
    return {
        {"model",
         [this] {
           v1::CreateSessionRequest request = New("create.model");
           request.set_model("other");
           EXPECT_EQ(Create(request), kNotFound);
           request.set_model("tales");
           EXPECT_EQ(Created(request).model(), "tales");
         }},
        {"session_id",
         [this] {
           EXPECT_EQ(Created(New("create.id")).id(), "create.id");
           EXPECT_EQ(Create(New("create.id")), grpc::StatusCode::ALREADY_EXISTS);
         }},
        {"text",
         [this] {
           v1::CreateSessionRequest request = New("create.text");
           request.set_text("Once upon a time");
           EXPECT_GT(Created(request).token_count(), 3);
         }},
        {"token_ids.ids",
         [this] {
           v1::CreateSessionRequest request = New("create.ids");
           for (const int id : {1, 300, 301}) request.mutable_token_ids()->add_ids(id);
           EXPECT_EQ(Created(request).token_count(), 3);
         }},
        {"ttl",
         [this] {
           v1::CreateSessionRequest request = New("create.ttl");
           request.mutable_ttl()->set_seconds(1234);
           EXPECT_EQ(Ttl(Created(request)), 1234);
         }},
        {"cache_salt",
         [this] {
           v1::CreateSessionRequest request = New("create.salt");
           request.set_text(kPrompt);
           request.set_cache_salt("salt");
           Created(request);
           v1::GenerateRequest generate = GreedyRequest(std::string(kPrompt) + " And", 1);
           EXPECT_EQ(Generate(generate).finished.usage().cached_tokens(), 0);
           generate.set_cache_salt("salt");
           EXPECT_GT(Generate(generate).finished.usage().cached_tokens(), 0);
         }},
    };
  }

  Exercises ListFields() const {
    using R = v1::ListSessionsRequest;
    const auto list = [this](const R& request, grpc::StatusCode expected = kOk) {
      v1::ListSessionsResponse response;
      EXPECT_EQ(Call(sessions_.get(), &Sessions::ListSessions, request, &response), expected);
      return response;
    };
    for (const char* id : {"list.a", "list.b", "list.c"}) Created(New(id));
    return {
        {"page_size",
         [=] {
           R request;
           EXPECT_GE(list(request).sessions_size(), 3);
           request.set_page_size(2);
           EXPECT_EQ(list(request).sessions_size(), 2);
         }},
        {"page_token",
         [=] {
           R request;
           request.set_page_size(1);
           const v1::ListSessionsResponse first = list(request);
           request.set_page_token(first.next_page_token());
           EXPECT_NE(list(request).sessions(0).id(), first.sessions(0).id());
         }},
        {"model",
         [=] {
           R request;
           request.set_model("tales");
           EXPECT_GE(list(request).sessions_size(), 3);
           request.set_model("other");
           EXPECT_EQ(list(request).sessions_size(), 0);
         }},
        {"owner",
         [=] {
           R request;
           request.set_owner("somebody");
           list(request, grpc::StatusCode::PERMISSION_DENIED);
         }},
    };
  }

  Exercises ForkFields() const {
    using R = v1::ForkSessionRequest;
    const auto fork = [this](const R& request, grpc::StatusCode expected = kOk) {
      v1::ForkSessionResponse response;
      EXPECT_EQ(Call(sessions_.get(), &Sessions::ForkSession, request, &response), expected);
      return response.session();
    };
    MakeTurns("fork");
    R valid;
    valid.set_session_id("fork");
    return {
        {"session_id",
         [=] {
           R request;
           request.set_session_id("fork.other");
           fork(request, kNotFound);
           EXPECT_EQ(fork(valid).turn(), 2u);
         }},
        {"new_session_id",
         [=] {
           R request = valid;
           request.set_new_session_id("fork.new");
           EXPECT_EQ(fork(request).id(), "fork.new");
         }},
        {"turn",
         [=] {
           R request = valid;
           request.set_turn(1);
           EXPECT_EQ(fork(request).turn(), 1u);
           request.set_turn(3);
           fork(request, kNotFound);
         }},
        {"ttl",
         [=] {
           R request = valid;
           request.mutable_ttl()->set_seconds(4321);
           EXPECT_EQ(Ttl(fork(request)), 4321);
         }},
    };
  }

  Exercises RewindFields() const {
    using R = v1::RewindSessionRequest;
    const auto rewind = [this](const std::string& id, uint64_t turn) {
      R request;
      request.set_session_id(id);
      request.set_turn(turn);
      v1::RewindSessionResponse response;
      return Call(sessions_.get(), &Sessions::RewindSession, request, &response);
    };
    MakeTurns("rewind");
    return {
        {"session_id", [=] { EXPECT_EQ(rewind("rewind.other", 1), kNotFound); }},
        {"turn",
         [=, this] {
           EXPECT_EQ(rewind("rewind", 3), kNotFound);
           EXPECT_EQ(rewind("rewind", 1), kOk);
           v1::Session session;
           Get("rewind", &session);
           EXPECT_EQ(session.turn(), 1u);
         }},
    };
  }

  Exercises ExportFields() const {
    MakeTurns("export");
    return {
        {"session_id", [this] { Export(ExportOf("export.other"), kNotFound); }},
        {"turn",
         [this] {
           v1::ExportSessionRequest request = ExportOf("export");
           const std::string now = Export(request).checkpoint().body();
           request.set_turn(1);
           EXPECT_NE(Export(request).checkpoint().body(), now);
           request.set_turn(3);
           Export(request, kNotFound);
         }},
        {"dtype",
         [this] {
           v1::ExportSessionRequest request = ExportOf("export");
           const size_t exact = Export(request).checkpoint().body().size();
           request.set_dtype(v1::STATE_DTYPE_BF16);
           EXPECT_LT(Export(request).checkpoint().body().size(), exact * 6 / 10);
         }},
    };
  }

  Exercises ImportFields() {
    using R = v1::ImportSessionRequest;
    const auto import = [this](const std::function<void(R*)>& set, v1::Session* session = nullptr) {
      R request;
      *request.mutable_checkpoint() = Export(ExportOf("import")).checkpoint();
      set(&request);
      v1::ImportSessionResponse response;
      const grpc::StatusCode code =
          Call(sessions_.get(), &Sessions::ImportSession, request, &response);
      if (session != nullptr) *session = response.session();
      return code;
    };
    MakeTurns("import");
    constexpr auto kDataLoss = grpc::StatusCode::DATA_LOSS;
    constexpr auto kFailedPrecondition = grpc::StatusCode::FAILED_PRECONDITION;
    return {
        {"checkpoint.format_version",
         [=] {
      EXPECT_EQ(import([](R* r) { r->mutable_checkpoint()->set_format_version(99); }),
                kFailedPrecondition);
         }},
        {"checkpoint.body",
         [=] {
      EXPECT_EQ(import([](R* r) { r->mutable_checkpoint()->mutable_body()->back() ^= 1; }),
                kDataLoss);
         }},
        {"checkpoint.checksum",
         [=] {
      EXPECT_EQ(import([](R* r) {
                  r->mutable_checkpoint()->set_checksum(r->checkpoint().checksum() ^ 1);
                }),
                kDataLoss);
         }},
        {"checkpoint.hmac_sha256",
         [=, this] {
      const TempDirectory directory;
      WriteFile(directory.File("key"), std::string(64, 'a'));
      Start({"--session_key_file=" + directory.File("key")});
      MakeTurns("import");
      EXPECT_EQ(import([](R*) {}), kOk);
      EXPECT_EQ(import([](R* r) { r->mutable_checkpoint()->clear_hmac_sha256(); }),
                kFailedPrecondition);
      Start({});
      MakeTurns("import");
         }},
        {"model",
         [=] {
      EXPECT_EQ(import([](R* r) { r->set_model("tales"); }), kOk);
      EXPECT_EQ(import([](R* r) { r->set_model("other"); }), kNotFound);
         }},
        {"session_id",
         [=] {
      v1::Session session;
           import([](R* r) { r->set_session_id("import.new"); }, &session);
    EXPECT_EQ(session.id(), "import.new");
    EXPECT_EQ(session.turn(), 2u);
  }},
        {"ttl",
         [=] {
  v1::Session session;
           import([](R* r) { r->mutable_ttl()->set_seconds(777); }, &session);
EXPECT_EQ(Ttl(session), 777);
}
}
,
}
;
}

Exercises GetFields() const {
  return {{"session_id", [this] {
             Created(New("get"));
             EXPECT_EQ(Get("get"), kOk);
             EXPECT_EQ(Get("get.other"), kNotFound);
           }}};
}
Exercises DeleteFields() const {
  return {{"session_id", [this] {
             Created(New("delete"));
             Created(New("stays"));
             v1::DeleteSessionRequest request;
             request.set_session_id("delete");
             v1::DeleteSessionResponse response;
             EXPECT_EQ(Call(sessions_.get(), &Sessions::DeleteSession, request, &response), kOk);
             EXPECT_EQ(Get("delete"), kNotFound);
             EXPECT_EQ(Get("stays"), kOk);
           }}};
}

// A request for one of the models by its name.
template <typename Request, typename Response>
std::function<void()> NamesAModel(grpc::Status (v1::ModelService::Stub::*method)(
    grpc::ClientContext*, const Request&, Response*)) const {
  return [this, method] {
    Request request;
    Response response;
    EXPECT_EQ(Call(models_.get(), method, request, &response), kOk);
    request.set_model("tales");
    EXPECT_EQ(Call(models_.get(), method, request, &response), kOk);
    request.set_model("other");
    EXPECT_EQ(Call(models_.get(), method, request, &response), kNotFound);
  };
}
// RPCs that are refused as a whole, with the method's name.
Exercises LoadFields() const {
  const auto refused = [this] {
    grpc::ClientContext context;
    v1::LoadModelRequest request;
    request.set_model("m");
    request.set_directory("d");
    const auto reader = models_->LoadModel(&context, request);
    v1::LoadModelResponse response;
    EXPECT_FALSE(reader->Read(&response));
    EXPECT_EQ(reader->Finish().error_code(), kUnimplemented);
  };
  return {{"model", refused}, {"directory", refused}};
}
Exercises UnloadFields() const {
  const auto refused = [this] {
    v1::UnloadModelRequest request;
    request.set_model("tales");
    request.mutable_drain_timeout()->set_seconds(1);
    v1::UnloadModelResponse response;
    EXPECT_EQ(Call(models_.get(), &v1::ModelService::Stub::UnloadModel, request, &response),
              kUnimplemented);
  };
  return {{"model", refused}, {"drain_timeout", refused}};
}

std::unique_ptr<Sessions> sessions_;
}
;

TEST_F(SessionFieldsTest, EveryFieldOfEverySessionRequestDoesWhatItSays) {
  RunExercises(*v1::CreateSessionRequest::descriptor()->file()->service(0),
               {
                   {"CreateSession", [this] { return CreateFields(); }},
                   {"GetSession", [this] { return GetFields(); }},
                   {"ListSessions", [this] { return ListFields(); }},
                   {"ForkSession", [this] { return ForkFields(); }},
                   {"RewindSession", [this] { return RewindFields(); }},
                   {"ExportSession", [this] { return ExportFields(); }},
                   {"ImportSession", [this] { return ImportFields(); }},
                   {"DeleteSession", [this] { return DeleteFields(); }},
               });
}

TEST_F(SessionFieldsTest, EveryFieldOfEveryModelRequestDoesWhatItSaysOrIsRefused) {
  using Models = v1::ModelService::Stub;
  RunExercises(*v1::GetModelRequest::descriptor()->file()->service(0),
               {
                   {"ListModels", [] { return Exercises(); }},
                   {"GetModel",
                    [this] {
                      return Exercises{{"model", NamesAModel(&Models::GetModel)}};
                    }},
                   {"GetLoad",
                    [this] {
                      return Exercises{{"model", NamesAModel(&Models::GetLoad)}};
                    }},
                   {"LoadModel", [this] { return LoadFields(); }},
                   {"UnloadModel", [this] { return UnloadFields(); }},
               });
}

// The tests of fields know these files and their one service each.
TEST(ProtoFieldsTest, NoServiceIsLeftOut) {
  std::set<std::string> files;
  for (const auto& file :
       std::filesystem::directory_iterator(std::string(MMFREE_SOURCE_DIR) + "/proto/mmfree/v1")) {
    files.insert(file.path().filename());
  }
  EXPECT_EQ(files, (std::set<std::string>{"inference.proto", "model.proto", "session.proto"}));
  for (const auto* message : {v1::GenerateRequest::descriptor(), v1::GetModelRequest::descriptor(),
                              v1::GetSessionRequest::descriptor()}) {
    EXPECT_EQ(message->file()->service_count(), 1) << message->file()->name();
  }
}

}  // namespace
}  // namespace mmfree
