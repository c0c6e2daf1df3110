#include "tests/integration/fields_fixture.h"

#include <thread>

namespace mmfree {

FieldsTest::Request FieldsTest::Sampled() {
  Request request = GreedyRequest(kText, 24);
  request.mutable_sampling()->set_temperature(1.0f);
  request.mutable_sampling()->set_seed(3);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}
FieldsTest::Request FieldsTest::Greedy() {
  Request request = Sampled();
  request.mutable_sampling()->set_temperature(0.0f);
  return request;
}

Generation FieldsTest::With(const Request& request, const Set& set) const {
  Request changed = request;
  set(&changed);
  Generation generation = Generate(changed);
  EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
  return generation;
}
grpc::StatusCode FieldsTest::CodeWith(const Request& request, const Set& set) const {
  Request changed = request;
  set(&changed);
  return Generate(changed).status.error_code();
}
std::vector<int32_t> FieldsTest::Ids(const Request& request, const Set& set) const {
  return With(request, set).token_ids;
}
v1::SessionCheckpoint FieldsTest::State() const {
  return With(Sampled(), [](Request* r) { r->mutable_response()->set_return_state(true); })
      .finished.state();
}
void FieldsTest::ExpectPreempts(
    const std::function<void(v1::InferenceService::Stub*)>& high) const {
  const auto server = ServerProcess::Start({"--max_sessions=1"});
  ASSERT_TRUE(server.ok()) << server.status();
  const auto stub = v1::InferenceService::NewStub(
      grpc::CreateChannel((*server)->address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, EndlessRequest());
  v1::GenerateResponse event;
  while (reader->Read(&event) && !event.has_delta()) {
  }
  std::thread client([&] {
    while (reader->Read(&event)) {
    }
  });
  high(stub.get());
  context.TryCancel();
  client.join();
  // Were it still of normal priority, the other would have ended first.
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

}  // namespace mmfree
