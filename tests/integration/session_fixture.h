// Fixture of tests of sessions on a real server.
#ifndef MMFREE_TESTS_INTEGRATION_SESSION_FIXTURE_H_
#define MMFREE_TESTS_INTEGRATION_SESSION_FIXTURE_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"

namespace mmfree {

// A session as its client sees it: what the context must be.
struct Mirror {
  std::string id;
  std::vector<int32_t> context;
  uint64_t turn = 0;
};

class SessionFixture : public LiveServer {
 protected:
  void Start(const std::vector<std::string>& flags = {}) {
    StartServer(flags);
    sessions_ = v1::SessionService::NewStub(channel_);
  }

  template <typename Response, typename Request>
  grpc::Status Call(grpc::Status (v1::SessionService::Stub::*method)(grpc::ClientContext*,
                                                                     const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + Patience(absl::Minutes(1))));
    return (sessions_.get()->*method)(&context, request, response);
  }

  std::string Create(const std::string& id = "") {
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    v1::CreateSessionResponse response;
    EXPECT_EQ(Call(&v1::SessionService::Stub::CreateSession, request, &response).error_message(),
              "");
    return response.session().id();
  }
  v1::Session Get(const std::string& id) {
    v1::GetSessionRequest request;
    request.set_session_id(id);
    v1::GetSessionResponse response;
    EXPECT_EQ(Call(&v1::SessionService::Stub::GetSession, request, &response).error_message(), "");
    return response.session();
  }
  grpc::Status Delete(const std::string& id) {
    v1::DeleteSessionRequest request;
    request.set_session_id(id);
    v1::DeleteSessionResponse response;
    return Call(&v1::SessionService::Stub::DeleteSession, request, &response);
  }
  v1::Session Fork(const std::string& id, std::optional<uint64_t> turn = std::nullopt) {
    v1::ForkSessionRequest request;
    request.set_session_id(id);
    if (turn.has_value()) request.set_turn(*turn);
    v1::ForkSessionResponse response;
    EXPECT_EQ(Call(&v1::SessionService::Stub::ForkSession, request, &response).error_message(), "");
    return response.session();
  }
  v1::SessionCheckpoint Export(const std::string& id, v1::StateDtype dtype = v1::STATE_DTYPE_F32) {
    v1::ExportSessionRequest request;
    request.set_session_id(id);
    request.set_dtype(dtype);
    v1::ExportSessionResponse response;
    EXPECT_EQ(Call(&v1::SessionService::Stub::ExportSession, request, &response).error_message(),
              "");
    return response.checkpoint();
  }
  grpc::Status Import(const v1::SessionCheckpoint& checkpoint, std::string* id) {
    v1::ImportSessionRequest request;
    *request.mutable_checkpoint() = checkpoint;
    v1::ImportSessionResponse response;
    const grpc::Status status = Call(&v1::SessionService::Stub::ImportSession, request, &response);
    *id = response.session().id();
    return status;
  }

  // A sampled request: draws depend on the position, so a wrong one shows.
  static v1::GenerateRequest Sampled(uint32_t max_new_tokens) {
    v1::GenerateRequest request;
    request.mutable_sampling()->set_seed(7);
    request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_response()->set_return_token_ids(true);
    return request;
  }

  // What a turn of `mirror` with `text` must give; the context becomes what it must be after it.
  std::vector<int32_t> Expect(Mirror* mirror, const std::string& text, uint32_t max_new_tokens) {
    v1::TokenizeRequest tokenize;
    tokenize.set_text(text);
    tokenize.set_continuation(!mirror->context.empty());
    const v1::TokenizeResponse ids = Tokenize(tokenize);
    mirror->context.insert(mirror->context.end(), ids.token_ids().begin(), ids.token_ids().end());
    ++mirror->turn;
    if (max_new_tokens == 0) return {};
    v1::GenerateRequest whole = Sampled(max_new_tokens);
    whole.mutable_token_ids()->mutable_ids()->Add(mirror->context.begin(), mirror->context.end());
    const Generation reference = Generate(whole);
    EXPECT_TRUE(reference.status.ok()) << reference.status.error_message();
    mirror->context.insert(mirror->context.end(), reference.token_ids.begin(),
                           reference.token_ids.end());
    return reference.token_ids;
  }

  void ExpectTurn(Mirror* mirror, const std::string& text, uint32_t max_new_tokens) {
    const std::vector<int32_t> expected = Expect(mirror, text, max_new_tokens);
    v1::GenerateRequest request = Sampled(max_new_tokens);
    request.set_session_id(mirror->id);
    request.set_expected_turn(mirror->turn - 1);
    if (!text.empty()) request.set_text(text);
    const Generation turn = Generate(request);
    ASSERT_TRUE(turn.status.ok()) << turn.status.error_message();
    EXPECT_EQ(turn.token_ids, expected);
    EXPECT_EQ(turn.finished.session_turn(), mirror->turn);
    const v1::Session session = Get(mirror->id);
    EXPECT_EQ(session.turn(), mirror->turn);
    EXPECT_EQ(session.token_count(), static_cast<int64_t>(mirror->context.size()));
    EXPECT_FALSE(session.busy());
  }

  // Starts a turn that does not end by itself, and waits until it has begun.
  struct Endless {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader;
    v1::GenerateResponse event;
  };
  std::unique_ptr<Endless> BeginEndless(const std::string& id) {
    auto endless = std::make_unique<Endless>();
    v1::GenerateRequest request = EndlessRequest();
    request.set_session_id(id);
    endless->reader = inference_->Generate(&endless->context, request);
    EXPECT_TRUE(endless->reader->Read(&endless->event));
    return endless;
  }
  // A client can know of its turn's end before the server does: its own deadline, or its cancel.
  void AwaitFree(const std::string& id) {
    const absl::Time deadline = absl::Now() + Patience(absl::Minutes(1));
    while (Get(id).busy()) ASSERT_LT(absl::Now(), deadline);
  }
  static grpc::Status End(Endless* endless) {
    while (endless->reader->Read(&endless->event)) {
    }
    return endless->reader->Finish();
  }

  std::unique_ptr<v1::SessionService::Stub> sessions_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_INTEGRATION_SESSION_FIXTURE_H_
