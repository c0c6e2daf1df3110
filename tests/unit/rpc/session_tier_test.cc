// Turns over gRPC while states come and go on devices and reads of these fail: engines on devices
// of the test's own.
#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "mmfree/v1/inference.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "server/engine/engine_group.h"
#include "server/rpc/server.h"
#include "server/sessions/memory_store.h"
#include "server/sessions/session_table.h"
#include "tests/support/fake_backend.h"
#include "tests/support/fake_model.h"
#include "tests/support/metric_reader.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

constexpr int32_t kVocabSize = 259;  // FakeTokenizer's
constexpr int kNewTokens = 3;

// With so many engines behind one name.
class SessionTierTest : public testing::TestWithParam<int> {
 protected:
  static constexpr int32_t kPlaces = 3;  // for states, of each device
  static constexpr size_t kClients = 4;
  static constexpr size_t kSessions = 6;  // of each client
  static constexpr int kTurns = 60;       // of each client

  // A session as its client knows it.
  struct Mirror {
    std::string id;
    std::vector<int32_t> context;
    uint64_t turn = 0;
  };

  void SetUp() override {
    std::vector<std::unique_ptr<Engine>> members;
    for (int i = 0; i < GetParam(); ++i) {
      FakeBackendOptions device;
      device.num_slots = 2;
      device.resident_slots = kPlaces;
      device.vocab_size = kVocabSize;
      devices_.push_back(std::make_shared<FakeDevice>(device));
      Engine::Options options;
      options.model_name = "fake";
      options.replica = absl::StrCat(i);
      options.session_metrics = session_metrics_.get();
      auto member = Engine::Create(options, std::make_shared<FakeModel>(kVocabSize),
                                   std::make_shared<FakeTokenizer>(),
                                   FakeDevice::MakeBackend(devices_.back()), metrics_.get());
      ASSERT_THAT(member, IsOk());
      members.push_back(*std::move(member));
    }
    engine_ = *GroupEngines(std::move(members));
    SessionTable::Options options;
    options.sweep_interval = absl::InfiniteDuration();
    table_ = std::make_unique<SessionTable>(options, MakeMemoryStore({}), session_metrics_.get());
    for (const auto& pool : engine_->device_pools()) table_->AddDevice(pool);
    ASSERT_THAT(models_.Add(engine_.get()), IsOk());
    Server::Options server;
    server.sessions = table_.get();
    server_ = *Server::Start(server, &models_, metrics_.get());
    const auto channel = grpc::CreateChannel(absl::StrCat("127.0.0.1:", server_->port()),
                                             grpc::InsecureChannelCredentials());
    inference_ = v1::InferenceService::NewStub(channel);
    sessions_ = v1::SessionService::NewStub(channel);
  }

  static void SetDeadline(grpc::ClientContext* context) {
    context->set_deadline(absl::ToChronoTime(absl::Now() + Patience(absl::Minutes(1))));
  }

  Mirror Create() {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::CreateSessionResponse response;
    const grpc::Status status =
        sessions_->CreateSession(&context, v1::CreateSessionRequest(), &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return {response.session().id(), {}, 0};
  }

  v1::Session Get(const std::string& id) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::GetSessionRequest request;
    request.set_session_id(id);
    v1::GetSessionResponse response;
    const grpc::Status status = sessions_->GetSession(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.session();
  }

  // Takes a turn that feeds `input`, and checks its tokens. A turn that fails never happened.
  grpc::Status TakeTurn(Mirror* mirror, const std::vector<int32_t>& input) {
    v1::GenerateRequest request;
    request.set_session_id(mirror->id);
    request.set_expected_turn(mirror->turn);
    request.mutable_token_ids()->mutable_ids()->Add(input.begin(), input.end());
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stopping()->set_max_new_tokens(kNewTokens);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_response()->set_return_token_ids(true);
    grpc::ClientContext context;
    SetDeadline(&context);
    const auto reader = inference_->Generate(&context, request);
    v1::GenerateResponse event;
    std::vector<int32_t> ids;
    while (reader->Read(&event)) {
      ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) {
      EXPECT_EQ(Get(mirror->id).turn(), mirror->turn);
      return status;
    }
    mirror->context.insert(mirror->context.end(), input.begin(), input.end());
    std::vector<int32_t> expected;
    for (const SampledToken& token :
         devices_[0]->Expected(mirror->context, SamplingParams(), kNewTokens)) {
      expected.push_back(token.token);
    }
    EXPECT_EQ(ids, expected);
    mirror->context.insert(mirror->context.end(), expected.begin(), expected.end());
    ++mirror->turn;
    return status;
  }

  prometheus::Registry registry_;
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(&registry_);
  std::unique_ptr<SessionMetrics> session_metrics_ = SessionMetrics::Create(&registry_);
  std::vector<std::shared_ptr<FakeDevice>> devices_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<SessionTable> table_;
  ModelRegistry models_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
};

// Many more sessions than places: most turns evict a state, some find their own evicted, and one in
// five reads of a device fails.
TEST_P(SessionTierTest, TurnsGoOnThroughEvictionsAndFailedReads) {
  for (const auto& device : devices_) device->FailResidentReads(5);
  std::vector<std::vector<Mirror>> mirrors(kClients);
  std::atomic<int> failed{0};
  std::vector<std::thread> clients;
  for (size_t client = 0; client < kClients; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<uint32_t>(client));
      std::vector<Mirror>& mine = mirrors[client];
      for (size_t i = 0; i < kSessions; ++i) mine.push_back(Create());
      for (int turn = 0; turn < kTurns; ++turn) {
        // Now one of all, now the last one again.
        Mirror& mirror = mine[random() % 2 == 0 ? 0 : random() % kSessions];
        const auto first = static_cast<int32_t>(3 + random() % 200);
        if (!TakeTurn(&mirror, {first, first + 1}).ok()) ++failed;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(failed.load(), 0);
  EXPECT_LT(failed.load(), static_cast<int>(kClients) * kTurns / 2);
  EXPECT_GT(MetricValue(registry_, "mmfree_session_evictions_total", "tier", "device"), 0);
  EXPECT_GT(MetricValue(registry_, "mmfree_session_resumes_total", "tier", "device"), 0);
  EXPECT_GT(MetricValue(registry_, "mmfree_session_resumes_total", "tier", "host"), 0);

  // Nothing of that is left: every session goes on from where its client has it.
  for (const auto& device : devices_) device->FailResidentReads(0);
  for (std::vector<Mirror>& mine : mirrors) {
    for (Mirror& mirror : mine) {
      EXPECT_TRUE(TakeTurn(&mirror, {7, 8}).ok());
      const v1::Session session = Get(mirror.id);
      EXPECT_EQ(session.turn(), mirror.turn);
      EXPECT_EQ(session.token_count(), static_cast<int64_t>(mirror.context.size()));
    }
  }
  for (const auto& device : devices_) {
    EXPECT_THAT(device->violations(), testing::IsEmpty());
    EXPECT_GT(device->num_steps(), 0);
  }
  EXPECT_EQ(table_->busy(), 0);
}

INSTANTIATE_TEST_SUITE_P(Engines, SessionTierTest, testing::Values(1, 2));

}  // namespace
}  // namespace mmfree
