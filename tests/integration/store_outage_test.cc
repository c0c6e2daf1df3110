// What a server says, and still does, while its session store cannot be used.
#include <signal.h>
#include <sys/mount.h>

#include <filesystem>
#include <fstream>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"
#include "tests/support/redis_process.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using grpc::health::v1::HealthCheckResponse;

constexpr char kSessionService[] = "mmfree.v1.SessionService";
constexpr char kWholeStore[] = "mmfree.v1.SessionService/whole";

class StoreOutageTest : public LiveServer {
 protected:
  HealthCheckResponse::ServingStatus Health(const std::string& service) const {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    const grpc::Status status =
        grpc::health::v1::Health::NewStub(channel_)->Check(&context, request, &response);
    return status.ok() ? response.status() : HealthCheckResponse::SERVICE_UNKNOWN;
  }
  // Waits until the session service's health is so, and expects everything else to say the same and
  // generation to work.
  void ExpectStore(bool usable) const {
    const auto expected = usable ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
    const absl::Time give_up = absl::Now() + Patience(absl::Minutes(1));
    while (Health(kSessionService) != expected && absl::Now() < give_up) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    EXPECT_EQ(Health(kSessionService), expected);
    EXPECT_EQ(Metric("mmfree_session_store_reachable"), usable ? 1 : 0);
    for (const char* name : {"", "tales", "mmfree.v1.InferenceService"}) {
      EXPECT_EQ(Health(name), HealthCheckResponse::SERVING) << name;
    }
    EXPECT_TRUE(Generate(GreedyRequest("Once", 2)).status.ok());
  }
  void Create(const std::string& id = "s") const {
    grpc::ClientContext context;
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    v1::CreateSessionResponse response;
    const grpc::Status status =
        v1::SessionService::NewStub(channel_)->CreateSession(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  Generation Turn(uint64_t expected_turn) const {
    v1::GenerateRequest request = GreedyRequest("Once", 2);
    request.set_session_id("s");
    request.set_expected_turn(expected_turn);
    return Generate(request);
  }
  void ExpectTurnFails(uint64_t expected_turn) const {
    const Generation turn = Turn(expected_turn);
    EXPECT_EQ(turn.status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_FALSE(turn.finished.has_usage());
  }
};

TEST_F(StoreOutageTest, RedisGoneAndBackWithNothingElseAsking) {
  const std::unique_ptr<RedisProcess> redis = RedisProcess::Start();
  if (redis == nullptr) GTEST_SKIP() << "redis-server is not installed or does not start";
  StartServer({absl::StrCat("--session_store=redis://127.0.0.1:", redis->port()),
               "--session_probe_interval=100ms"});
  ExpectStore(true);
  Create();
  EXPECT_TRUE(Turn(0).status.ok());
  redis->Kill();
  ExpectStore(false);
  ExpectTurnFails(1);
  ASSERT_TRUE(redis->Restart());
  ExpectStore(true);
  EXPECT_TRUE(Turn(1).status.ok());
  // It answers reads all the time.
  ASSERT_TRUE(redis->Command("REPLICAOF 127.0.0.1 1"));
  ExpectStore(false);
  ExpectTurnFails(2);
  ASSERT_TRUE(redis->Command("REPLICAOF NO ONE"));
  ExpectStore(true);
  const Generation turn = Turn(2);
  EXPECT_EQ(turn.finished.session_turn(), 3u);
}

TEST_F(StoreOutageTest, RedisThatIsNotThereYetIsSaidFromTheStart) {
  const std::unique_ptr<RedisProcess> redis = RedisProcess::Start();
  if (redis == nullptr) GTEST_SKIP() << "redis-server is not installed or does not start";
  redis->Kill();
  StartServer({absl::StrCat("--session_store=redis://127.0.0.1:", redis->port())});
  EXPECT_EQ(Health(kSessionService), HealthCheckResponse::NOT_SERVING);
  ASSERT_TRUE(redis->Restart());
  ExpectStore(true);
}

TEST_F(StoreOutageTest, AFullDiskIsSaidAndSoIsItsEnd) {
  const TempDirectory directory;
  if (mount("tmpfs", directory.path().c_str(), "tmpfs", 0, "size=40m,mode=700") != 0) {
    GTEST_SKIP() << "cannot mount a file system here";
  }
  const absl::Cleanup unmount = [&] { umount2(directory.path().c_str(), MNT_DETACH); };
  const auto fill = [&](const std::string& name, uintmax_t free) {
    std::ofstream out(directory.File(name), std::ios::binary);
    const std::string block(4096, 'x');
    while (std::filesystem::space(directory.path()).available > free &&
           out.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) {
    }
  };
  fill("reserve", 4 << 20);  // too little left for RocksDB to set space aside
  StartServer(
      {"--session_store=rocksdb:" + directory.File("store"), "--session_probe_interval=100ms"});
  ExpectStore(true);
  Create();
  EXPECT_TRUE(Turn(0).status.ok());
  fill("ballast", 0);
  ExpectStore(false);
  ExpectTurnFails(1);
  std::filesystem::remove(directory.File("ballast"));
  std::filesystem::remove(directory.File("reserve"));
  ExpectStore(true);
  const Generation turn = Turn(1);
  EXPECT_TRUE(turn.status.ok()) << turn.status.error_message();
  EXPECT_EQ(turn.finished.session_turn(), 2u);
}

// An operator's way: the error, the flag that it names, and the list that this leaves.
TEST_F(StoreOutageTest, ADamagedLogIsSalvagedWhenAskedFor) {
  const TempDirectory directory;
  const std::string store = directory.File("store");
  const std::vector<std::string> flags = {"--session_store=rocksdb:" + store};
  StartServer(flags);
  Create();
  EXPECT_TRUE(Turn(0).status.ok());
  EXPECT_TRUE(Turn(1).status.ok());
  server_->Signal(SIGKILL);
  ASSERT_THAT(server_->Wait(), IsOk());
  std::filesystem::path log;
  for (const auto& entry : std::filesystem::directory_iterator(store)) {
    if (entry.path().extension() == ".log") log = entry.path();
  }
  // Into the first turn's state: three states are nearly all of the log.
  std::fstream file(log, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(std::filesystem::file_size(log) / 2));
  file.write("damage", 6);
  file.close();

  const auto refused = ServerProcess::Start(flags);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(std::string(refused.status().message()), testing::HasSubstr("--session_salvage"));
  StartServer({flags[0], "--session_salvage"});
  EXPECT_THAT(server_->Log(), testing::HasSubstr("sessions.txt"));
  // The last turn is whole, and so is the session.
  const Generation turn = Turn(2);
  EXPECT_TRUE(turn.status.ok()) << turn.status.error_message();
  EXPECT_EQ(turn.finished.session_turn(), 3u);
}

// The records of two sessions are in one table; the last one's are cut off.
TEST_F(StoreOutageTest, ATruncatedTableIsSaidAndCostsOneSession) {
  const TempDirectory directory;
  const std::string store = directory.File("store");
  StartServer({"--session_store=rocksdb:" + store});
  Create();
  Create("t");
  EXPECT_TRUE(Turn(0).status.ok());
  EXPECT_EQ(Health(kWholeStore), HealthCheckResponse::SERVING);
  server_->Signal(SIGTERM);
  ASSERT_THAT(server_->Wait(), IsOk());
  for (const auto& entry : std::filesystem::directory_iterator(store)) {
    if (entry.path().extension() != ".sst") continue;
    const size_t record = ReadFile(entry.path()).rfind("tales");
    ASSERT_NE(record, std::string::npos);
    std::filesystem::resize_file(entry.path(), record);
  }

  StartServer({"--session_store=rocksdb:" + store});
  EXPECT_THAT(server_->Log(), testing::HasSubstr("1 sessions are whole, 1 are lost"));
  EXPECT_EQ(Health(kSessionService), HealthCheckResponse::SERVING);
  EXPECT_EQ(Health(kWholeStore), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Metric("mmfree_session_store_lost_sessions"), 1);
  EXPECT_EQ(Turn(1).finished.session_turn(), 2u);
  v1::GenerateRequest request = GreedyRequest("Once", 2);
  request.set_session_id("t");
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::DATA_LOSS);
}

TEST_F(StoreOutageTest, WithoutSessionsThereIsNoSuchService) {
  StartServer({"--session_store=none"});
  EXPECT_EQ(Health(kSessionService), HealthCheckResponse::SERVICE_UNKNOWN);
  EXPECT_EQ(Health(""), HealthCheckResponse::SERVING);
}

}  // namespace
}  // namespace mmfree
