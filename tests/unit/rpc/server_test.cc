// A real gRPC server on a free port, with an engine that the test plays.
#include "server/rpc/server.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"
#include "mmfree/v1/inference.grpc.pb.h"
#include "mmfree/v1/model.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "server/scheduler/retry_after.h"
#include "tests/support/fake_clock.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"
#include "tests/unit/rpc/fake_engine.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

using grpc::health::v1::HealthCheckResponse;

class ServerTest : public testing::Test {
 protected:
  ServerTest() : metrics_(Metrics::Create(&registry_)) {}

  void Start(Server::Options options = {}) {
    ASSERT_THAT(models_.Add(&engine_), IsOk());
    absl::StatusOr<std::unique_ptr<Server>> server =
        Server::Start(options, &models_, metrics_.get());
    ASSERT_THAT(server, IsOk());
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", server_->port()),
                                   grpc::InsecureChannelCredentials());
    inference_ = v1::InferenceService::NewStub(channel_);
    model_stub_ = v1::ModelService::NewStub(channel_);
    health_ = grpc::health::v1::Health::NewStub(channel_);
  }

  double Rpcs(const std::string& method, const std::string& status) {
    double sum = 0;
    for (const prometheus::MetricFamily& family : registry_.Collect()) {
      if (family.name != "mmfree_rpcs_total") continue;
      for (const prometheus::ClientMetric& metric : family.metric) {
        int matches = 0;
        for (const auto& label : metric.label) {
          matches += label.value == method || label.value == status ? 1 : 0;
        }
        if (matches == 2) sum += metric.counter.value;
      }
    }
    return sum;
  }

  grpc::Status CheckHealth(const std::string& service, HealthCheckResponse* response) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    return health_->Check(&context, request, response);
  }

  // A stream of which the engine has the request.
  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader;
    FakeEngine::Submission submission;
  };
  std::unique_ptr<Stream> Generate(size_t index, const v1::GenerateRequest& request) {
    auto stream = std::make_unique<Stream>();
    stream->reader = inference_->Generate(&stream->context, request);
    stream->submission = engine_.WaitFor(index);
    return stream;
  }
  static v1::GenerateRequest TextRequest(const std::string& text) {
    v1::GenerateRequest request;
    request.set_text(text);
    return request;
  }

  prometheus::Registry registry_;
  std::unique_ptr<Metrics> metrics_;
  FakeEngine engine_;
  ModelRegistry models_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::ModelService::Stub> model_stub_;
  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

TEST_F(ServerTest, GenerateFillsInTheDocumentedDefaults) {
  Start();
  const auto stream = Generate(0, TextRequest("Hi"));
  const GenerationRequest& request = stream->submission.generation;
  EXPECT_EQ(request.prompt, (std::vector<int32_t>{1, 3 + 'H', 3 + 'i'}));
  EXPECT_EQ(request.sampling.temperature, 1.0f);
  EXPECT_LT(request.sampling.seed, uint64_t{1} << 53);
  EXPECT_EQ(request.max_new_tokens, 256);
  EXPECT_EQ(request.min_new_tokens, 0);
  EXPECT_EQ(request.eos_token_ids, std::vector<int32_t>{engine_.model().config().eos_token_id});
  EXPECT_EQ(request.deadline, absl::InfiniteFuture());
  EXPECT_FALSE(request.request_id.empty());
  v1::GenerateResponse event;
  ASSERT_TRUE(stream->reader->Read(&event));
  EXPECT_EQ(event.started().seed(), request.sampling.seed);
  EXPECT_EQ(event.started().request_id(), request.request_id);
  engine_.End(stream->submission.handle, GenerationResult());
  ASSERT_TRUE(stream->reader->Read(&event));
  EXPECT_TRUE(event.has_finished());
  EXPECT_FALSE(stream->reader->Read(&event));
  EXPECT_TRUE(stream->reader->Finish().ok());
}

TEST_F(ServerTest, GeneratePassesOnWhatWasAsked) {
  Start();
  v1::GenerateRequest request;
  request.set_request_id("mine");
  request.mutable_token_ids()->add_ids(7);
  request.mutable_sampling()->set_temperature(0.5f);
  request.mutable_sampling()->set_seed(~uint64_t{0});
  request.mutable_stopping()->set_max_new_tokens(9);
  request.mutable_stopping()->set_min_new_tokens(4);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_stopping()->add_stop_token_ids(8);
  const auto stream = Generate(0, request);
  const GenerationRequest& got = stream->submission.generation;
  EXPECT_EQ(got.request_id, "mine");
  EXPECT_EQ(got.prompt, std::vector<int32_t>{7});
  EXPECT_EQ(got.sampling.temperature, 0.5f);
  EXPECT_EQ(got.sampling.seed, ~uint64_t{0});
  EXPECT_EQ(got.max_new_tokens, 9);
  EXPECT_EQ(got.min_new_tokens, 4);
  EXPECT_TRUE(got.eos_token_ids.empty());
  EXPECT_EQ(got.stop_token_ids, std::vector<int32_t>{8});
  engine_.End(stream->submission.handle, GenerationResult());
}

TEST_F(ServerTest, VanishedClientFreesTheRequest) {
  Start();
  const auto stream = Generate(0, TextRequest("Hi"));
  stream->context.TryCancel();
  engine_.WaitUntilIdle();
  EXPECT_EQ(stream->reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ServerTest, DeadlineReachesTheEngineAndIsNotACancel) {
  Start();
  auto stream = std::make_unique<Stream>();
  const absl::Duration kTimeout = Patience(absl::Seconds(2));
  const absl::Time deadline = absl::Now() + kTimeout;
  stream->context.set_deadline(absl::ToChronoTime(deadline));
  stream->reader = inference_->Generate(&stream->context, TextRequest("Hi"));
  stream->submission = engine_.WaitFor(0);
  // What is sent is the time left, which is added to the time of its arrival.
  constexpr absl::Duration kRounding = absl::Milliseconds(100);
  const absl::Time arrived = stream->submission.generation.deadline;
  EXPECT_GE(arrived, deadline - kRounding);
  EXPECT_LE(arrived, absl::Now() + kTimeout + kRounding);
  EXPECT_EQ(stream->reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  engine_.End(stream->submission.handle, absl::DeadlineExceededError("the deadline passed"));
  server_.reset();  // waits for the call to be over
  EXPECT_EQ(Rpcs("Generate", "DEADLINE_EXCEEDED"), 1);
}

// gRPC's clock is not ours to the millisecond: it may end the call just before we see the deadline.
TEST_F(ServerTest, CancelJustBeforeTheDeadlineIsTheDeadlines) {
  FakeClock clock;
  Server::Options options;
  options.clock = &clock;
  Start(options);
  for (const bool near : {true, false}) {
    auto stream = std::make_unique<Stream>();
    stream->context.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(1));
    stream->reader = inference_->Generate(&stream->context, TextRequest("Hi"));
    stream->submission = engine_.WaitFor(near ? 0 : 1);
    const absl::Time deadline = stream->submission.generation.deadline;
    clock.Advance(deadline - clock.Now() - (near ? absl::Milliseconds(3) : absl::Seconds(1)));
    stream->context.TryCancel();
    stream->reader->Finish();
    if (near) {
      // On the same connection, so the server hears of the cancel first.
      grpc::ClientContext context;
      v1::GetLoadResponse load;
      EXPECT_TRUE(model_stub_->GetLoad(&context, {}, &load).ok());
      EXPECT_EQ(engine_.cancels(), 0);
      engine_.End(stream->submission.handle, absl::DeadlineExceededError("the deadline passed"));
    } else {
      engine_.WaitUntilIdle();
      EXPECT_EQ(engine_.cancels(), 1);
    }
  }
  server_.reset();  // waits for the calls to be over
  EXPECT_EQ(Rpcs("Generate", "DEADLINE_EXCEEDED"), 1);
  EXPECT_EQ(Rpcs("Generate", "CANCELLED"), 1);
}

TEST_F(ServerTest, ErrorsCarryTheirDetails) {
  Start();
  grpc::ClientContext context;
  v1::GenerateRequest request = TextRequest("Hi");
  request.mutable_sampling()->set_temperature(-1.0f);
  auto reader = inference_->Generate(&context, request);
  v1::GenerateResponse event;
  EXPECT_FALSE(reader->Read(&event));
  grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  google::rpc::BadRequest bad_request;
  ASSERT_TRUE(details.details_size() == 1 && details.details(0).UnpackTo(&bad_request));
  EXPECT_EQ(bad_request.field_violations(0).field(), "sampling.temperature");
  EXPECT_EQ(Rpcs("Generate", "INVALID_ARGUMENT"), 1);

  engine_.Refuse(absl::ResourceExhaustedError("the queue is full"));
  grpc::ClientContext context2;
  reader = inference_->Generate(&context2, TextRequest("Hi"));
  status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  ASSERT_TRUE(details.details_size() == 1 && details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
}

TEST_F(ServerTest, LargeTextsAreTokenizedToo) {
  Start();
  const std::string text(500'000, 'x');
  const auto stream = Generate(0, TextRequest(text));
  EXPECT_EQ(stream->submission.generation.prompt.size(), text.size() + 1);
  engine_.End(stream->submission.handle, GenerationResult());
  v1::GenerateResponse event;
  while (stream->reader->Read(&event)) {
  }
  EXPECT_TRUE(event.has_finished());
  EXPECT_TRUE(stream->reader->Finish().ok());
}

TEST_F(ServerTest, TooManyPromptTokensNameTheLimit) {
  Server::Options options;
  options.limits.max_prompt_tokens = 10;
  Start(options);
  for (const std::string& text : {std::string(10, 'x'), std::string(100'000, 'x')}) {
    grpc::ClientContext context;
    auto reader = inference_->Generate(&context, TextRequest(text));
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("text: is "));
    EXPECT_THAT(status.error_message(), HasSubstr("--max_prompt_tokens"));
  }
}

TEST_F(ServerTest, TooLargeMessagesAreRefusedNotFatal) {
  Server::Options options;
  options.max_message_bytes = 1000;
  Start(options);
  grpc::ClientContext context;
  auto reader = inference_->Generate(&context, TextRequest(std::string(2000, 'x')));
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("1000"));
}

TEST_F(ServerTest, ScoreJoinsItsInputsInOrder) {
  Start();
  v1::ScoreRequest request;
  request.add_inputs()->set_text("a");
  request.add_inputs()->mutable_token_ids()->add_ids(5);
  request.set_last_logits(true);
  v1::ScoreResponse response;
  grpc::Status status;
  std::thread caller([&] {
    grpc::ClientContext context;
    status = inference_->Score(&context, request, &response);
  });
  const FakeEngine::Submission second = engine_.WaitFor(1);
  EXPECT_TRUE(second.score.last_logits);
  ScoreResult second_result;
  second_result.argmax = {6};
  second_result.last_logits = {0.5f};
  engine_.EndScore(second.handle, second_result);
  ScoreResult first_result;
  first_result.logprobs = {-1.5f};
  first_result.argmax = {3, 4};
  engine_.EndScore(engine_.WaitFor(0).handle, first_result);
  caller.join();
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.results_size(), 2);
  EXPECT_THAT(response.results(0).token_ids(), ElementsAre(1, 3 + 'a'));
  EXPECT_THAT(response.results(0).logprobs(), ElementsAre(-1.5f));
  EXPECT_THAT(response.results(0).argmax(), ElementsAre(3, 4));
  EXPECT_THAT(response.results(1).token_ids(), ElementsAre(5));
  EXPECT_THAT(response.results(1).last_logits(), ElementsAre(0.5f));
}

TEST_F(ServerTest, OneFailedInputFailsTheScoreAndFreesTheOthers) {
  Start();
  v1::ScoreRequest request;
  for (int i = 0; i < 3; ++i) request.add_inputs()->set_text("a");
  v1::ScoreResponse response;
  grpc::Status status;
  std::thread caller([&] {
    grpc::ClientContext context;
    status = inference_->Score(&context, request, &response);
  });
  engine_.WaitFor(2);
  engine_.End(engine_.WaitFor(1).handle, absl::InternalError("device fault"));
  caller.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  engine_.WaitUntilIdle();
}

// A retry could not help, so they are not told to come again.
TEST_F(ServerTest, WhatTheEngineCanNeverAdmitIsInvalid) {
  engine_.SetLimits({.requests = 5, .queue_tokens = 20, .prompt_tokens = 10});
  Start();
  const auto score = [this](int inputs, int tokens) {
    v1::ScoreRequest request;
    for (int i = 0; i < inputs; ++i) {
      v1::TokenIds* const ids = request.add_inputs()->mutable_token_ids();
      for (int t = 0; t < tokens; ++t) ids->add_ids(5);
    }
    grpc::ClientContext context;
    v1::ScoreResponse response;
    return inference_->Score(&context, request, &response);
  };
  const auto generate = [this](const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    return inference_->Generate(&context, request)->Finish();
  };
  v1::GenerateRequest candidates = TextRequest("a");
  candidates.set_candidates(6);
  v1::GenerateRequest ids;
  for (int i = 0; i < 11; ++i) ids.mutable_token_ids()->add_ids(5);
  const struct {
    grpc::Status status;
    const char* field;
    const char* limit;
  } refusals[] = {
      {score(6, 1), "inputs", "--max_queue"},
      {score(1, 11), "inputs[0]", "--max_queue_tokens"},
      {score(3, 7), "inputs", "--max_queue_tokens"},
      {generate(candidates), "candidates", "--max_queue"},
      {generate(TextRequest("abcdefghij")), "text", "--max_queue_tokens"},
      {generate(ids), "token_ids", "--max_queue_tokens"},
  };
  for (const auto& refusal : refusals) {
    EXPECT_EQ(refusal.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(refusal.status.error_message(), HasSubstr(refusal.limit));
    google::rpc::Status details;
    google::rpc::BadRequest bad;
    ASSERT_TRUE(details.ParseFromString(refusal.status.error_details()));
    ASSERT_EQ(details.details_size(), 1);
    ASSERT_TRUE(details.details(0).UnpackTo(&bad));
    ASSERT_EQ(bad.field_violations_size(), 1);
    EXPECT_EQ(bad.field_violations(0).field(), refusal.field);
  }
  // What just fits is the engine's to decide.
  engine_.Refuse(absl::ResourceExhaustedError("full"));
  EXPECT_EQ(score(4, 5).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  candidates.set_candidates(5);
  EXPECT_EQ(generate(candidates).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

// The engine's estimate for the very request that it refuses, and nothing else, goes out.
TEST_F(ServerTest, ARefusalCarriesItsOwnEstimate) {
  Start();
  absl::Status refusal = absl::ResourceExhaustedError("full");
  SetRetryAfter(absl::Milliseconds(2750), &refusal);
  engine_.Refuse(refusal);
  grpc::ClientContext context;
  const grpc::Status status = inference_->Generate(&context, TextRequest("a"))->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  google::rpc::Status details;
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  ASSERT_EQ(details.details_size(), 1);
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 750'000'000);
}

TEST_F(ServerTest, CancelledScoreFreesItsRequests) {
  Start();
  v1::ScoreRequest request;
  for (int i = 0; i < 3; ++i) request.add_inputs()->set_text("a");
  grpc::ClientContext context;
  std::thread caller([&] {
    v1::ScoreResponse response;
    EXPECT_EQ(inference_->Score(&context, request, &response).error_code(),
              grpc::StatusCode::CANCELLED);
  });
  engine_.WaitFor(2);
  context.TryCancel();
  caller.join();
  engine_.WaitUntilIdle();
}

TEST_F(ServerTest, DetokenizeUndoesTokenize) {
  Start();
  grpc::ClientContext context;
  v1::TokenizeRequest tokenize;
  tokenize.set_text("h\xc3\xa9llo");
  tokenize.set_return_pieces(false);
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(inference_->Tokenize(&context, tokenize, &tokens).ok());
  EXPECT_EQ(tokens.token_ids(0), 1);
  EXPECT_EQ(tokens.pieces_size(), 0);
  grpc::ClientContext context2;
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(inference_->Detokenize(&context2, detokenize, &text).ok());
  EXPECT_EQ(text.text(), tokenize.text());
}

TEST_F(ServerTest, ModelsAndLoad) {
  Start();
  grpc::ClientContext context;
  v1::ListModelsResponse models;
  ASSERT_TRUE(model_stub_->ListModels(&context, {}, &models).ok());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).name(), "fake");
  EXPECT_EQ(models.models(0).state(), v1::MODEL_STATE_READY);
  EXPECT_EQ(models.models(0).vocab_size(), FakeEngine::kVocabSize);
  EXPECT_EQ(models.models(0).bos_token_id(), engine_.tokenizer().bos_id());
  EXPECT_EQ(models.models(0).limits().default_max_new_tokens(), 256);
  grpc::ClientContext context2;
  v1::GetLoadResponse load;
  ASSERT_TRUE(model_stub_->GetLoad(&context2, {}, &load).ok());
  EXPECT_TRUE(load.accepting());
  EXPECT_EQ(load.queued(), 3);
  EXPECT_EQ(load.queued_tokens(), 30);
  EXPECT_EQ(load.slots_total(), 4);
  EXPECT_EQ(load.estimated_wait().seconds(), 1);
  grpc::ClientContext context3;
  v1::GetModelRequest unknown;
  unknown.set_model("other");
  v1::GetModelResponse model;
  const grpc::Status status = model_stub_->GetModel(&context3, unknown, &model);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("served: fake"));
}

TEST_F(ServerTest, WithoutASessionTableSessionsAreNotImplemented) {
  Start();
  const auto sessions = v1::SessionService::NewStub(channel_);
  grpc::ClientContext context;
  v1::CreateSessionResponse created;
  const grpc::Status status = sessions->CreateSession(&context, {}, &created);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("--session_store=none"));
}

TEST_F(ServerTest, LaterRpcsSayThatTheyAreNotImplemented) {
  Start();
  grpc::ClientContext context2;
  auto reader = model_stub_->LoadModel(&context2, {});
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(ServerTest, HealthFollowsTheEngine) {
  Start();
  HealthCheckResponse response;
  for (const char* service : {"", "fake", "mmfree.v1.InferenceService"}) {
    ASSERT_TRUE(CheckHealth(service, &response).ok()) << service;
    EXPECT_EQ(response.status(), HealthCheckResponse::SERVING) << service;
  }
  EXPECT_EQ(CheckHealth("other", &response).error_code(), grpc::StatusCode::NOT_FOUND);
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service("fake");
  auto watch = health_->Watch(&context, request);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  engine_.SetHealthy(false);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  context.TryCancel();
  watch->Finish();
}

TEST_F(ServerTest, WatchOfAnUnknownServiceSaysSo) {
  Start();
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service("other");
  auto watch = health_->Watch(&context, request);
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  context.TryCancel();
  watch->Finish();
}

TEST_F(ServerTest, DrainSaysNotServingEndsWhatRunsAndCloses) {
  Start();
  grpc::ClientContext watch_context;
  auto watch = health_->Watch(&watch_context, {});
  HealthCheckResponse health;
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::SERVING);
  const auto stream = Generate(0, TextRequest("Hi"));
  std::thread drain([&] { server_->Drain(absl::Now()); });
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::NOT_SERVING);
  v1::GenerateResponse event;
  while (stream->reader->Read(&event)) EXPECT_TRUE(event.has_started());
  const grpc::Status status = stream->reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(status.error_details().empty());
  drain.join();
  watch_context.TryCancel();
  watch->Finish();
}

TEST_F(ServerTest, TakenPortIsAClearError) {
  Start();
  Server::Options options;
  options.listen = absl::StrCat("127.0.0.1:", server_->port());
  EXPECT_THAT(Server::Start(options, &models_, metrics_.get()),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("Address already in use")));
}

TEST_F(ServerTest, WrongOptionsAreClearErrors) {
  const auto start = [&](const Server::Options& options) {
    return Server::Start(options, &models_, metrics_.get());
  };
  for (const char* listen : {"", "50051", "host", "127.0.0.1:99999", ":1", "::1:80", "[]:1"}) {
    Server::Options options;
    options.listen = listen;
    EXPECT_THAT(start(options),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HOST:PORT")))
        << listen;
  }
  Server::Options options;
  options.tls.cert_file = "missing.pem";
  EXPECT_THAT(start(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls_key")));
  options.tls.key_file = "missing.key";
  EXPECT_THAT(start(options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("missing.pem")));
  const TempDirectory directory;
  WriteFile(directory.File("cert.pem"), "not a certificate");
  WriteFile(directory.File("key.pem"), "not a key");
  options.tls.cert_file = directory.File("cert.pem");
  options.tls.key_file = directory.File("key.pem");
  EXPECT_THAT(start(options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("PEM certificate")));
}

}  // namespace
}  // namespace mmfree
