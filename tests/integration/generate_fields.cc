// The fields of GenerateRequest itself.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/fields_fixture.h"
#include "tests/support/temp_directory.h"

namespace mmfree {

Exercises FieldsTest::GenerateInputs() {
  // The code when the state that a request goes on from was changed.
  const auto code_of_state = [this](const std::function<void(v1::SessionCheckpoint*)>& change) {
    return CodeWith(Sampled(), [&](Request* r) {
      *r->mutable_state() = State();
      change(r->mutable_state());
    });
  };
  const auto create = [this](const std::string& id) {
    grpc::ClientContext context;
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    v1::CreateSessionResponse response;
    EXPECT_TRUE(
        v1::SessionService::NewStub(channel_)->CreateSession(&context, request, &response).ok());
  };
  return {
      {"request_id",
       [=, this] {
         EXPECT_EQ(
             With(Sampled(), [](Request* r) { r->set_request_id("mine"); }).started.request_id(),
             "mine");
         EXPECT_NE(With(Sampled()).started.request_id(), "");
       }},
      {"model",
       [=, this] {
         EXPECT_EQ(With(Sampled(), [](Request* r) { r->set_model("tales"); }).started.model(),
                   "tales");
         EXPECT_EQ(CodeWith(Sampled(), [](Request* r) { r->set_model("other"); }),
                   grpc::StatusCode::NOT_FOUND);
       }},
      {"text",
       [=, this] {
         EXPECT_NE(Ids(Greedy(), [](Request* r) { r->set_text("The king said"); }), Ids(Greedy()));
       }},
      {"token_ids.ids",
       [=, this] {
         v1::TokenizeRequest tokenize;
         tokenize.set_text(kText);
         const v1::TokenizeResponse ids = Tokenize(tokenize);
         const auto set = [&](Request* r) {
           *r->mutable_token_ids()->mutable_ids() = ids.token_ids();
         };
         EXPECT_EQ(Ids(Sampled(), set), Ids(Sampled()));
       }},
      {"session_id",
       [=, this] {
         create("s");
         const auto set = [](Request* r) { r->set_session_id("s"); };
         EXPECT_EQ(With(Sampled(), set).finished.session_turn(), 1u);
         const Generation second = With(Sampled(), set);
         EXPECT_EQ(second.finished.session_turn(), 2u);
         EXPECT_NE(second.token_ids, Ids(Sampled()));
       }},
      {"expected_turn",
       [=, this] {
         create("turns");
         const auto set = [](Request* r) {
           r->set_session_id("turns");
           r->set_expected_turn(0);
         };
         EXPECT_EQ(With(Sampled(), set).finished.session_turn(), 1u);
         EXPECT_EQ(CodeWith(Sampled(), set), grpc::StatusCode::ABORTED);
       }},
      {"state.body",
       [=, this] {
         const auto set = [&](Request* r) { *r->mutable_state() = State(); };
         EXPECT_NE(Ids(Sampled(), set), Ids(Sampled()));
         EXPECT_EQ(code_of_state([](auto* s) { s->mutable_body()->back() ^= 1; }),
                   grpc::StatusCode::DATA_LOSS);
       }},
      {"state.checksum",
       [=] {
         EXPECT_EQ(code_of_state([](auto* s) { s->set_checksum(s->checksum() ^ 1); }),
                   grpc::StatusCode::DATA_LOSS);
       }},
      {"state.format_version",
       [=] {
         EXPECT_EQ(code_of_state([](auto* s) { s->set_format_version(99); }),
                   grpc::StatusCode::FAILED_PRECONDITION);
       }},
      {"state.hmac_sha256",
       [=, this] {
         const TempDirectory directory;
         WriteFile(directory.File("key"), std::string(64, 'a'));
         StartServer({"--session_key_file=" + directory.File("key")});
         const auto unchanged = [](auto*) {};
         EXPECT_EQ(code_of_state(unchanged), grpc::StatusCode::OK);
         EXPECT_EQ(code_of_state([](auto* s) { s->clear_hmac_sha256(); }),
                   grpc::StatusCode::FAILED_PRECONDITION);
         StartServer();
       }},
      {"cache_salt",
       [=, this] {
         const auto cached = [this](const std::string& salt) {
           return With(Greedy(),
                       [&](Request* r) {
                         r->set_text(absl::StrCat("Of salt. ", kText));
                         r->set_cache_salt(salt);
                       })
               .finished.usage()
               .cached_tokens();
         };
         EXPECT_EQ(cached("a"), 0);
         EXPECT_GT(cached("a"), 0);
         EXPECT_EQ(cached("b"), 0);
       }},
      {"candidates",
       [=, this] {
         int finished = 0;
         const Generation several = With(Sampled(), [](Request* r) { r->set_candidates(3); });
         for (const auto& event : several.events) finished += event.has_finished();
         EXPECT_EQ(finished, 3);
       }},
      {"best_of",
       [=, this] {
         const auto sum = [this](uint32_t best_of) {
           return With(Sampled(),
                       [&](Request* r) {
                         r->mutable_response()->set_logprobs(true);
                         r->set_best_of(best_of);
                       })
               .finished.cumulative_logprob();
         };
         EXPECT_GT(sum(8), sum(1));
       }},
      {"priority",
       [=, this] {
         ExpectPreempts([](v1::InferenceService::Stub* stub) {
           Request request = Sampled();
           request.set_priority(v1::PRIORITY_HIGH);
           grpc::ClientContext context;
           const auto reader = stub->Generate(&context, request);
           v1::GenerateResponse event;
           while (reader->Read(&event)) {
           }
           EXPECT_TRUE(reader->Finish().ok());
         });
       }},
      {"speculative_tokens",
       [=, this] {
         const std::string metric = "mmfree_speculative_accepted_tokens_total{";
         Request request = Greedy();
         request.mutable_sampling()->add_allowed_token_ids(300);
         const double before = Metric(metric);
         Ids(request);
         EXPECT_EQ(Metric(metric), before);
         Ids(request, [](Request* r) { r->set_speculative_tokens(8); });
         EXPECT_GT(Metric(metric), before);
       }},
  };
}

}  // namespace mmfree
