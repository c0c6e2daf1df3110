// Servers killed at random moments while clients take turns: no committed turn is lost, none
// happens twice, conflicts are ABORTED, and the states are those of exactly these turns.
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "mmfree/v1/session.grpc.pb.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"
#include "tests/support/redis_process.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

// Every attempt of a turn feeds a number of its own, in three tokens, and emits one.
using Mark = int32_t;
constexpr size_t kTurnTokens = 4;
constexpr Mark kBase = 1000;

std::array<int32_t, 3> TokensOf(Mark mark) {
  return {kBase + mark / kBase / kBase, kBase + mark / kBase % kBase, kBase + mark % kBase};
}
Mark MarkOf(const int32_t* tokens) {
  return ((tokens[0] - kBase) * kBase + tokens[1] - kBase) * kBase + tokens[2] - kBase;
}

// What the clients of one session were told of their attempts.
struct Told {
  std::map<uint64_t, Mark> committed;  // by turn
  std::set<Mark> refused;              // ABORTED
  std::set<Mark> unknown;              // the server went away
  uint64_t present = 0;                // the last turn that somebody knows of
  // What was found in the store so far.
  std::vector<int32_t> context;
};

struct Replica {
  std::unique_ptr<ServerProcess> server;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::InferenceService::Stub> inference;
  std::unique_ptr<v1::SessionService::Stub> sessions;
  std::atomic<bool> alive{false};
};

class SessionKillTest : public testing::Test {
 protected:
  static constexpr int kClients = 4;
  static constexpr int kSessions = 3;

  // A few cycles here; MMFREE_KILL_CYCLES=200 makes it a soak.
  static int Cycles() {
    const char* const asked = std::getenv("MMFREE_KILL_CYCLES");
    return asked != nullptr ? std::atoi(asked) : 5;
  }

  void Launch(Replica* replica, const std::vector<std::string>& flags) {
    absl::StatusOr<std::unique_ptr<ServerProcess>> server = ServerProcess::Start(flags);
    ASSERT_THAT(server, IsOk());
    replica->server = *std::move(server);
    replica->channel =
        grpc::CreateChannel(replica->server->address(), grpc::InsecureChannelCredentials());
    replica->inference = v1::InferenceService::NewStub(replica->channel);
    replica->sessions = v1::SessionService::NewStub(replica->channel);
    replica->alive = true;
  }

  static void SetDeadline(grpc::ClientContext* context) {
    context->set_deadline(absl::ToChronoTime(absl::Now() + Patience(absl::Minutes(1))));
  }

  static void Create(const Replica& replica, const std::string& id) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    v1::CreateSessionResponse response;
    const grpc::Status status = replica.sessions->CreateSession(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }

  static v1::SessionCheckpointBody Export(const Replica& replica, const std::string& id) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ExportSessionRequest request;
    request.set_session_id(id);
    v1::ExportSessionResponse response;
    const grpc::Status status = replica.sessions->ExportSession(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    v1::SessionCheckpointBody body;
    EXPECT_TRUE(body.ParseFromString(response.checkpoint().body()));
    return body;
  }

  // nullopt: the replica cannot tell.
  static std::optional<uint64_t> PresentTurn(const Replica& replica, const std::string& id) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::GetSessionRequest request;
    request.set_session_id(id);
    v1::GetSessionResponse response;
    const grpc::Status status = replica.sessions->GetSession(&context, request, &response);
    if (!status.ok()) return std::nullopt;
    return response.session().turn();
  }

  static v1::GenerateRequest Turn(const std::string& id, uint32_t max_new_tokens) {
    v1::GenerateRequest request;
    request.set_session_id(id);
    request.mutable_sampling()->set_seed(7);
    request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
    request.mutable_stopping()->set_ignore_eos(true);
    return request;
  }
  static grpc::Status Run(const Replica& replica, const v1::GenerateRequest& request,
                          uint64_t* turn) {
    grpc::ClientContext context;
    SetDeadline(&context);
    const auto reader = replica.inference->Generate(&context, request);
    v1::GenerateResponse event;
    while (reader->Read(&event)) {
      if (event.has_finished()) *turn = event.finished().session_turn();
    }
    return reader->Finish();
  }

  // Takes turns of random sessions at random living replicas until `stop`, or none lives.
  void TakeTurns(uint32_t seed) {
    std::mt19937 random(seed);
    while (!stop_) {
      Replica& replica = *replicas_[random() % replicas_.size()];
      if (!replica.alive) {
        if (!AnyAlive()) return;
        continue;
      }
      const size_t session = random() % kSessions;
      const Mark mark = next_mark_.fetch_add(1);
      v1::GenerateRequest request = Turn(Id(session), 1);
      for (const int32_t token : TokensOf(mark)) request.mutable_token_ids()->add_ids(token);
      if (random() % 2 == 0) {
        absl::MutexLock lock(&mutex_);
        request.set_expected_turn(told_[session].present);
      }
      uint64_t turn = 0;
      const grpc::Status status = Run(replica, request, &turn);
      Note(replica, session, mark, status, turn);
    }
  }

  void Note(const Replica& replica, size_t session, Mark mark, const grpc::Status& status,
            uint64_t turn) {
    const uint64_t present = status.error_code() == grpc::StatusCode::ABORTED
                                 ? PresentTurn(replica, Id(session)).value_or(0)
                                 : turn;
    absl::MutexLock lock(&mutex_);
    Told& told = told_[session];
    told.present = std::max(told.present, present);
    switch (status.error_code()) {
      case grpc::StatusCode::OK:
        EXPECT_TRUE(told.committed.emplace(turn, mark).second)
            << "turn " << turn << " was committed twice";
        ++turns_;
        break;
      case grpc::StatusCode::ABORTED:
        told.refused.insert(mark);
        break;
      default:
        EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
        told.unknown.insert(mark);
    }
  }

  bool AnyAlive() const {
    for (const auto& replica : replicas_) {
      if (replica->alive) return true;
    }
    return false;
  }
  // Waits for so many turns more, however long they take; false when that is too long.
  bool AwaitTurns(uint64_t more) {
    absl::MutexLock lock(&mutex_);
    const uint64_t enough = turns_ + more;
    const auto reached = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return turns_ >= enough; };
    return mutex_.AwaitWithTimeout(absl::Condition(&reached), Patience(absl::Minutes(2)));
  }

  // Waits until every replica has found its store again.
  void AwaitStore() const {
    const absl::Time give_up = absl::Now() + Patience(absl::Minutes(1));
    for (const auto& replica : replicas_) {
      while (!PresentTurn(*replica, Id(0)).has_value() && absl::Now() < give_up) {
        absl::SleepFor(absl::Milliseconds(5));
      }
    }
  }

  // The store's context of a session is what its clients were told, turn by turn.
  void Check(const Replica& replica, size_t session) {
    const v1::SessionCheckpointBody body = Export(replica, Id(session));
    std::vector<int32_t> last(body.last_token_ids().begin(), body.last_token_ids().end());
    last.insert(last.end(), body.pending_token_ids().begin(), body.pending_token_ids().end());
    absl::MutexLock lock(&mutex_);
    Told& told = told_[session];
    const uint64_t turns = body.turn();
    ASSERT_EQ(body.token_count() + body.pending_token_ids_size(),
              static_cast<int64_t>(turns * kTurnTokens));
    if (!told.committed.empty()) {
      ASSERT_GE(turns, told.committed.rbegin()->first) << "a committed turn is lost";
    }
    const size_t known = told.context.size() / kTurnTokens;
    ASSERT_GE(turns, known);
    const size_t fresh = (turns - known) * kTurnTokens;
    ASSERT_LE(fresh, last.size()) << "too many turns in a cycle for what a checkpoint remembers";
    told.context.insert(told.context.end(), last.end() - static_cast<ptrdiff_t>(fresh), last.end());
    for (uint64_t turn = known + 1; turn <= turns; ++turn) {
      const Mark mark = MarkOf(&told.context[(turn - 1) * kTurnTokens]);
      EXPECT_FALSE(told.refused.contains(mark)) << "an aborted turn was committed";
      const auto committed = told.committed.find(turn);
      if (committed != told.committed.end()) {
        EXPECT_EQ(mark, committed->second) << "turn " << turn << " is another";
      } else {
        EXPECT_EQ(told.unknown.erase(mark), 1u) << "turn " << turn << " is nobody's, or a second";
      }
    }
    told.present = turns;
  }

  // The state is that of the context, fed as a whole.
  void CheckState(const Replica& replica, size_t session) {
    const std::string twin = absl::StrCat("twin-", session);
    Create(replica, twin);
    absl::MutexLock lock(&mutex_);
    const std::vector<int32_t>& context = told_[session].context;
    constexpr size_t kChunk = 4000;
    for (size_t begin = 0; begin < context.size(); begin += kChunk) {
      v1::GenerateRequest feed = Turn(twin, 0);
      const size_t end = std::min(context.size(), begin + kChunk);
      feed.mutable_token_ids()->mutable_ids()->Add(context.begin() + static_cast<ptrdiff_t>(begin),
                                                   context.begin() + static_cast<ptrdiff_t>(end));
      uint64_t turn = 0;
      const grpc::Status status = Run(replica, feed, &turn);
      ASSERT_TRUE(status.ok()) << status.error_message();
    }
    v1::SessionCheckpointBody a = Export(replica, Id(session));
    v1::SessionCheckpointBody b = Export(replica, twin);
    a.clear_turn();
    b.clear_turn();
    EXPECT_TRUE(a.SerializeAsString() == b.SerializeAsString()) << Id(session);
  }

  // Kills a server in each cycle, or the store when `store` is given.
  void KillAndCheck(size_t replicas, const std::vector<std::string>& flags,
                    RedisProcess* store = nullptr) {
    std::mt19937 random(20240607);
    for (size_t i = 0; i < replicas; ++i) {
      replicas_.push_back(std::make_unique<Replica>());
      Launch(replicas_.back().get(), flags);
    }
    for (size_t session = 0; session < kSessions; ++session) Create(*replicas_[0], Id(session));
    const int cycles = Cycles();
    for (int cycle = 0; cycle < cycles && !HasFailure(); ++cycle) {
      stop_ = false;
      std::vector<std::thread> clients;
      for (int i = 0; i < kClients; ++i) {
        clients.emplace_back([this, seed = random()] { TakeTurns(seed); });
      }
      Replica& victim = *replicas_[random() % replicas];
      EXPECT_TRUE(AwaitTurns(3 + random() % 10));
      absl::SleepFor(absl::Microseconds(random() % 20'000));
      if (store != nullptr) {
        EXPECT_TRUE(store->Restart());
      } else {
        victim.server->Signal(SIGKILL);
        victim.alive = false;
      }
      EXPECT_TRUE(!AnyAlive() || AwaitTurns(5));
      stop_ = true;
      for (std::thread& client : clients) client.join();
      if (store == nullptr) {
        ASSERT_THAT(victim.server->Wait(), IsOk());
        Launch(&victim, flags);
      } else {
        AwaitStore();
      }
      for (size_t session = 0; session < kSessions; ++session) Check(victim, session);
    }
    size_t refused = 0;
    size_t unknown = 0;
    for (size_t session = 0; session < kSessions; ++session) {
      CheckState(*replicas_[0], session);
      absl::MutexLock lock(&mutex_);
      refused += told_[session].refused.size();
      unknown += told_[session].unknown.size();
    }
    absl::MutexLock lock(&mutex_);
    RecordProperty("turns", static_cast<int>(turns_));
    printf("%d kills: %d turns committed, %d refused, %d lost with their server\n", cycles,
           static_cast<int>(turns_), static_cast<int>(refused), static_cast<int>(unknown));
    EXPECT_GE(turns_, 3u * static_cast<uint64_t>(cycles));
  }

  static std::string Id(size_t session) { return absl::StrCat("s", session); }

  std::vector<std::unique_ptr<Replica>> replicas_;
  std::atomic<bool> stop_{false};
  std::atomic<Mark> next_mark_{0};
  absl::Mutex mutex_;
  std::array<Told, kSessions> told_ ABSL_GUARDED_BY(mutex_);
  uint64_t turns_ ABSL_GUARDED_BY(mutex_) = 0;  // that were committed
};

TEST_F(SessionKillTest, RocksDbKeepsWhatWasCommitted) {
  const TempDirectory directory;
  KillAndCheck(1, {"--session_store=rocksdb:" + directory.File("sessions")});
}

TEST_F(SessionKillTest, TwoReplicasOnOneRedisNeverBothCommitOneTurn) {
  const std::unique_ptr<RedisProcess> redis = RedisProcess::Start();
  if (redis == nullptr) GTEST_SKIP() << "redis-server is not installed or does not start";
  KillAndCheck(2, {absl::StrCat("--session_store=redis://127.0.0.1:", redis->port())});
}

TEST_F(SessionKillTest, RedisItselfKilledLosesNothingThatItHadAcknowledged) {
  const std::unique_ptr<RedisProcess> redis = RedisProcess::Start();
  if (redis == nullptr) GTEST_SKIP() << "redis-server is not installed or does not start";
  KillAndCheck(2, {absl::StrCat("--session_store=redis://127.0.0.1:", redis->port())}, redis.get());
}

}  // namespace
}  // namespace mmfree
