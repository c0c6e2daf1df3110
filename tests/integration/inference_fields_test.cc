// Every field of every request of InferenceService over a real server.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/integration/fields_fixture.h"

namespace mmfree {
namespace {

class InferenceFieldsTest : public FieldsTest {
 protected:
  Exercises GenerateFields() {
    Exercises all = GenerateInputs();
    for (const Exercises& more : {GenerateSampling(), GenerateStopping(), GenerateResponse()}) {
      all.insert(more.begin(), more.end());
    }
    return all;
  }

  Exercises ScoreFields() {
    const auto score = [this](const std::function<void(v1::ScoreRequest*)>& set,
                              grpc::Status* status) {
      v1::ScoreRequest request;
      request.add_inputs()->set_text(kText);
      set(&request);
      grpc::ClientContext context;
      v1::ScoreResponse response;
      *status = inference_->Score(&context, request, &response);
      return response;
    };
    const auto scored = [score](const std::function<void(v1::ScoreRequest*)>& set) {
      grpc::Status status;
      v1::ScoreResponse response = score(set, &status);
      EXPECT_TRUE(status.ok()) << status.error_message();
      return response;
    };
    const auto code = [score](const std::function<void(v1::ScoreRequest*)>& set) {
      grpc::Status status;
      score(set, &status);
      return status.error_code();
    };
    using R = v1::ScoreRequest;
    return {
        {"request_id",
         [=] {
           EXPECT_EQ(code([](R* r) { r->set_request_id("mine"); }), grpc::StatusCode::OK);
           EXPECT_EQ(code([](R* r) { r->set_request_id("not mine"); }),
                     grpc::StatusCode::INVALID_ARGUMENT);
         }},
        {"model",
         [=] {
           EXPECT_EQ(code([](R* r) { r->set_model("tales"); }), grpc::StatusCode::OK);
           EXPECT_EQ(code([](R* r) { r->set_model("other"); }), grpc::StatusCode::NOT_FOUND);
         }},
        {"inputs.text",
         [=] {
           const v1::ScoreResponse two = scored([](R* r) { r->add_inputs()->set_text("Other"); });
           ASSERT_EQ(two.results_size(), 2);
           EXPECT_LT(two.results(1).token_ids_size(), two.results(0).token_ids_size());
         }},
        {"inputs.token_ids.ids",
         [=] {
           const v1::ScoreResponse text = scored([](R*) {});
           const v1::ScoreResponse ids = scored([&](R* r) {
             *r->mutable_inputs(0)->mutable_token_ids()->mutable_ids() =
                 text.results(0).token_ids();
           });
           EXPECT_EQ(ids.results(0).token_ids_size(), text.results(0).token_ids_size());
           for (int i = 0; i < text.results(0).logprobs_size(); ++i) {
             EXPECT_EQ(ids.results(0).logprobs(i), text.results(0).logprobs(i));
           }
         }},
        {"last_logits",
         [=] {
           EXPECT_EQ(scored([](R*) {}).results(0).last_logits_size(), 0);
           EXPECT_EQ(scored([](R* r) { r->set_last_logits(true); }).results(0).last_logits_size(),
                     4096);
         }},
        {"priority",
         [this] {
           ExpectPreempts([](v1::InferenceService::Stub* stub) {
             v1::ScoreRequest request;
             request.add_inputs()->set_text(kText);
             request.set_priority(v1::PRIORITY_HIGH);
             grpc::ClientContext context;
             v1::ScoreResponse response;
             EXPECT_TRUE(stub->Score(&context, request, &response).ok());
           });
         }},
    };
  }

  Exercises TokenizeFields() {
    using R = v1::TokenizeRequest;
    const auto tokenize = [this](const std::function<void(R*)>& set) {
      R request;
      request.set_text("Once upon");
      set(&request);
      return Tokenize(request);
    };
    return {
        {"model",
         [this] {
           R request;
           request.set_model("other");
           grpc::ClientContext context;
           v1::TokenizeResponse response;
           EXPECT_EQ(inference_->Tokenize(&context, request, &response).error_code(),
                     grpc::StatusCode::NOT_FOUND);
         }},
        {"text",
         [=] {
           EXPECT_GT(tokenize([](R*) {}).token_ids_size(),
                     tokenize([](R* r) { r->set_text(""); }).token_ids_size());
         }},
        {"bos",
         [=] {
           EXPECT_EQ(tokenize([](R*) {}).token_ids(0), 1);
           EXPECT_NE(tokenize([](R* r) { r->set_bos(false); }).token_ids(0), 1);
         }},
        {"continuation",
         [=, this] {
           const v1::TokenizeResponse ids = tokenize([](R* r) { r->set_continuation(true); });
           EXPECT_NE(ids.token_ids(0), 1);
           EXPECT_EQ(Detokenize({ids.token_ids().begin(), ids.token_ids().end()}, true),
                     "Once upon");
         }},
        {"return_pieces",
         [=] {
           EXPECT_EQ(tokenize([](R*) {}).pieces_size(), 0);
           const v1::TokenizeResponse pieces = tokenize([](R* r) { r->set_return_pieces(true); });
           EXPECT_EQ(pieces.pieces_size(), pieces.token_ids_size());
         }},
    };
  }

  Exercises DetokenizeFields() {
    v1::TokenizeRequest tokenize;
    tokenize.set_text("upon");
    tokenize.set_bos(false);
    const v1::TokenizeResponse tokens = Tokenize(tokenize);
    const std::vector<int32_t> ids(tokens.token_ids().begin(), tokens.token_ids().end());
    return {
        {"model",
         [this] {
           v1::DetokenizeRequest request;
           request.set_model("other");
           grpc::ClientContext context;
           v1::DetokenizeResponse response;
           EXPECT_EQ(inference_->Detokenize(&context, request, &response).error_code(),
                     grpc::StatusCode::NOT_FOUND);
         }},
        {"token_ids", [this, ids] { EXPECT_EQ(Detokenize(ids, false), "upon"); }},
        {"continuation", [this, ids] { EXPECT_EQ(Detokenize(ids, true), " upon"); }},
    };
  }
};

TEST_F(InferenceFieldsTest, EveryFieldOfEveryRequestDoesWhatItSays) {
  RunExercises(*v1::GenerateRequest::descriptor()->file()->service(0),
               {
                   {"Generate", [this] { return GenerateFields(); }},
                   {"Score", [this] { return ScoreFields(); }},
                   {"Tokenize", [this] { return TokenizeFields(); }},
                   {"Detokenize", [this] { return DetokenizeFields(); }},
               });
}

}  // namespace
}  // namespace mmfree
