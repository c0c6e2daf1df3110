// What a caller is told when a request cannot be read, or its output cannot go on.
#include <grpcpp/generic/generic_stub.h>

#include <future>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "mmfree/v1/session.pb.h"
#include "tests/integration/live_server.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The fields that an error's details name.
std::vector<std::string> FieldsOf(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::BadRequest bad_request;
  if (!details.ParseFromString(status.error_details()) || details.details_size() != 1 ||
      !details.details(0).UnpackTo(&bad_request)) {
    return {"no details"};
  }
  std::vector<std::string> fields;
  for (const auto& violation : bad_request.field_violations()) fields.push_back(violation.field());
  return fields;
}

class DecodingErrorsTest : public LiveServer {
 protected:
  void SetUp() override { StartServer(); }

  // The only token with these bytes.
  int32_t Token(const std::string& text) const {
    v1::TokenizeRequest request;
    request.set_text(text);
    request.set_continuation(true);
    const v1::TokenizeResponse response = Tokenize(request);
    EXPECT_EQ(response.token_ids_size(), 1) << text;
    return response.token_ids(0);
  }

  // The token that is one byte.
  int32_t ByteToken(char byte) const {
    v1::TokenizeRequest request;
    request.set_text("\U0001F9FF");
    request.set_continuation(true);
    const v1::TokenizeResponse response = Tokenize(request);
    EXPECT_EQ(response.token_ids_size(), 4);  // F0 9F A7 BF
    return response.token_ids(0) - 0xf0 + static_cast<unsigned char>(byte);
  }

  // Sends `bytes` as the request of a method and nothing else.
  grpc::Status SendBytes(const std::string& method, const std::string& bytes) const {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    std::promise<grpc::Status> done;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response,
                   [&done](const grpc::Status& status) { done.set_value(status); });
    return done.get_future().get();
  }
};

TEST_F(DecodingErrorsTest, AnOutputThatCannotGoOnNamesTheFieldsThatLeftNothing) {
  const int32_t a = Token("a");
  const int32_t b = Token("b");
  const auto expect = [this](const auto& set, const std::vector<std::string>& fields) {
    v1::GenerateRequest request = GreedyRequest("Once", 8);
    set(&request);
    const Generation generation = Generate(request);
    EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(FieldsOf(generation.status), fields) << generation.status.error_message();
    EXPECT_THAT(generation.status.error_message(), HasSubstr("no token is left to choose from"));
  };
  const auto allow = [](v1::GenerateRequest* request, int32_t id) {
    request->mutable_sampling()->add_allowed_token_ids(id);
  };
  // After "a" only "b" can follow, and after "ab" only the end.
  expect(
      [&](v1::GenerateRequest* request) {
        request->mutable_constraint()->set_regex("ab");
        allow(request, a);
      },
      {"constraint.regex", "sampling.allowed_token_ids"});
  expect(
      [&](v1::GenerateRequest* request) {
        request->mutable_constraint()->set_grammar("root ::= \"a\" \"b\"");
        allow(request, a);
        allow(request, b);
      },
      {"constraint.grammar", "sampling.allowed_token_ids"});
  expect(
      [&](v1::GenerateRequest* request) {
        request->mutable_constraint()->set_regex("ab");
        for (const int32_t id : {a, b, ByteToken('b')}) allow(request, id);
        for (const int32_t id : {b, ByteToken('b')}) {
          request->mutable_stopping()->add_stop_token_ids(id);
        }
      },
      {"constraint.regex", "stopping.stop_token_ids"});
  expect(
      [&](v1::GenerateRequest* request) {
        request->mutable_constraint()->set_json_schema(R"({"const": 7})");
        for (const int32_t id : {Token("7"), ByteToken('7')}) {
          request->mutable_sampling()->add_banned_token_ids(id);
        }
      },
      {"constraint.json_schema", "sampling.banned_token_ids"});
}

// The first byte of a character alone ends as U+FFFD, which is text.
TEST_F(DecodingErrorsTest, AnUnfinishedCharacterCanCompleteAStopString) {
  v1::GenerateRequest request = GreedyRequest("Once", 1);
  request.mutable_sampling()->add_allowed_token_ids(ByteToken('\xf0'));
  const Generation without = Generate(request);
  EXPECT_EQ(without.text, "\uFFFD");
  EXPECT_EQ(without.finished.finish_reason(), v1::FINISH_REASON_LENGTH);

  request.mutable_stopping()->add_stop_strings("\uFFFD");
  request.mutable_response()->set_return_state(true);
  const Generation stopped = Generate(request);
  EXPECT_EQ(stopped.text, "");
  EXPECT_EQ(stopped.finished.finish_reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(stopped.finished.stop_string(), "\uFFFD");
  EXPECT_EQ(stopped.finished.usage().completion_tokens(), 1);

  // The context is what was sent: nothing but the prompt.
  v1::GenerateRequest next = GreedyRequest(" upon", 8);
  *next.mutable_state() = stopped.finished.state();
  EXPECT_EQ(Generate(next).token_ids, Generate(GreedyRequest("Once upon", 8)).token_ids);
}

TEST_F(DecodingErrorsTest, WhatCannotBeParsedIsSaidWithDetailsByEveryMethod) {
  int methods = 0;
  for (const auto* message : {v1::GenerateRequest::descriptor(), v1::GetModelRequest::descriptor(),
                              v1::GetSessionRequest::descriptor()}) {
    const google::protobuf::ServiceDescriptor* const service = message->file()->service(0);
    for (int i = 0; i < service->method_count(); ++i, ++methods) {
      const std::string method =
          "/" + std::string(service->full_name()) + "/" + std::string(service->method(i)->name());
      const grpc::Status status = SendBytes(method, "\xff");
      EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
      EXPECT_THAT(FieldsOf(status), ElementsAre("request")) << method;
      EXPECT_THAT(status.error_message(), HasSubstr("cannot be parsed")) << method;
    }
  }
  EXPECT_EQ(methods, 17);
  // A text that is not UTF-8: field 3 of one byte.
  const grpc::Status status = SendBytes("/mmfree.v1.InferenceService/Generate", "\x1a\x01\xff");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("UTF-8"));
  EXPECT_EQ(Metric("mmfree_rpcs_total{method=\"Generate\",status=\"INVALID_ARGUMENT\"}"), 2.0);
}

}  // namespace
}  // namespace mmfree
