// What is Redis' own: outages, and two servers on one store. store_test.cc has the rest.
#include "server/sessions/redis_store.h"

#include <prometheus/registry.h>

#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/redis_connection.h"
#include "server/sessions/session_table.h"
#include "tests/support/holding_proxy.h"
#include "tests/support/redis_process.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::HasSubstr;

const ModelShape kShape = {.digest = std::string(64, 'a'), .state_floats = 4, .vocab_size = 100};

SessionState StateAt(int64_t tokens) {
  SessionState state;
  state.state = {1.0f, 2.0f, 3.0f, static_cast<float>(tokens)};
  state.token_count = tokens;
  return state;
}

class RedisStoreTest : public testing::Test {
 protected:
  void SetUp() override {
    redis_ = RedisProcess::Start();
    if (redis_ == nullptr) GTEST_SKIP() << "redis-server is not installed or does not start";
  }

  std::unique_ptr<SessionStore> MakeStore() { return MakeStore(redis_->port(), absl::Minutes(1)); }
  static std::unique_ptr<SessionStore> MakeStore(int port, absl::Duration timeout) {
    RedisStoreOptions options;
    options.host = "127.0.0.1";
    options.port = port;
    options.timeout = timeout;
    options.first_back_off = absl::ZeroDuration();
    options.max_back_off = absl::ZeroDuration();
    return MakeRedisStore(options);
  }
  std::unique_ptr<SessionTable> MakeTable() { return MakeTable(MakeStore()); }
  std::unique_ptr<SessionTable> MakeTable(std::unique_ptr<SessionStore> store) {
    SessionTable::Options options;
    options.sweep_interval = absl::InfiniteDuration();
    options.store_health.interval = absl::InfiniteDuration();
    return std::make_unique<SessionTable>(options, std::move(store), metrics_.get());
  }
  static absl::Status RunTurn(SessionTable* table, const SessionName& name, int64_t tokens) {
    const auto turn = table->Begin(name, std::nullopt);
    if (!turn.ok()) return turn.status();
    return (*turn)->Commit(StateAt(tokens)).status();
  }

  const SessionName name_ = {"alice", "s"};
  prometheus::Registry registry_;
  std::unique_ptr<SessionMetrics> metrics_ = SessionMetrics::Create(&registry_);
  std::unique_ptr<RedisProcess> redis_;
};

TEST_F(RedisStoreTest, ATurnWhoseStoreGoesAwayIsUnavailableAndTheNextFindsTheLastCommit) {
  const auto table = MakeTable();
  ASSERT_THAT(table->Create(name_, "m", kShape.digest, StateAt(0), std::nullopt), IsOk());
  ASSERT_THAT(RunTurn(table.get(), name_, 3), IsOk());
  {
    const auto turn = table->Begin(name_, std::nullopt);
    ASSERT_THAT(turn, IsOk());
    redis_->Kill();
    EXPECT_THAT((*turn)->Commit(StateAt(9)),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("redis")));
  }
  EXPECT_THAT(RunTurn(table.get(), name_, 9), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_EQ(table->busy(), 0);
  ASSERT_TRUE(redis_->Restart());
  EXPECT_EQ(table->Read(name_, std::nullopt, kShape)->state.token_count, 3);
  EXPECT_THAT(RunTurn(table.get(), name_, 9), IsOk());
}

TEST_F(RedisStoreTest, AFrozenServerIsUnavailableAndSaysWhy) {
  ASSERT_THAT(MakeTable()->Create(name_, "m", kShape.digest, StateAt(0), std::nullopt), IsOk());
  const auto table = MakeTable(MakeStore(redis_->port(), absl::Milliseconds(300)));
  absl::StatusOr<std::unique_ptr<SessionTurn>> turn;
  do {  // the machine may be slower than that, too
    turn = table->Begin(name_, std::nullopt);
  } while (absl::IsUnavailable(turn.status()));
  ASSERT_THAT(turn, IsOk());
  redis_->Freeze();
  EXPECT_THAT((*turn)->Commit(StateAt(9)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no answer within 300ms")));
  redis_->Thaw();
  absl::StatusOr<SessionTable::ReadResult> read;
  do {
    read = table->Read(name_, std::nullopt, kShape);
  } while (absl::IsUnavailable(read.status()));
  ASSERT_THAT(read, IsOk());
  EXPECT_EQ(read->state.token_count, 0);
}

// A change whose caller was told that it failed may still be on its way, in a queue of the network
// or of a server that hangs. When it arrives it must not happen.
TEST_F(RedisStoreTest, AChangeThatArrivesAfterItsCallerGaveUpIsNotMade) {
  const auto store = MakeStore();
  HoldingProxy proxy(redis_->port());
  const auto held_store = MakeStore(proxy.port(), absl::Milliseconds(300));
  StoreChange change;
  change.name = name_;
  change.revision = 7;
  change.record = "record";
  ASSERT_THAT(store->Commit(change), IsOk());
  proxy.Hold("EVAL");
  change.expected = 7;
  change.revision = 8;
  EXPECT_THAT(held_store->Commit(change), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_THAT(held_store->Delete(name_), StatusIs(absl::StatusCode::kUnavailable, _));
  proxy.Release();
  const auto stored = store->Read(name_);
  ASSERT_THAT(stored, IsOk());
  EXPECT_EQ(stored->revision, 7u);
  absl::Status again;
  do {
    again = held_store->Commit(change);
  } while (absl::IsUnavailable(again));
  EXPECT_THAT(again, IsOk());
}

// What reads and takes no changes: a replica that was not promoted, a server out of memory.
TEST_F(RedisStoreTest, AProbeFindsAServerThatCannotBeWrittenTo) {
  const auto store = MakeStore();
  EXPECT_THAT(store->Probe(100'000), IsOk());
  ASSERT_TRUE(redis_->Command("CONFIG SET maxmemory 1"));
  EXPECT_THAT(store->Read(name_), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store->Probe(4096), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("OOM")));
  ASSERT_TRUE(redis_->Command("CONFIG SET maxmemory 0"));
  EXPECT_THAT(store->Probe(4096), IsOk());
  ASSERT_TRUE(redis_->Command("REPLICAOF 127.0.0.1 1"));
  EXPECT_THAT(store->Read(name_), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store->Probe(4096), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("READONLY")));
  ASSERT_TRUE(redis_->Command("REPLICAOF NO ONE"));
  EXPECT_THAT(store->Probe(4096), IsOk());
}

TEST_F(RedisStoreTest, AChangeThatIsSentTwiceIsMadeOnce) {
  const auto store = MakeStore();
  StoreChange change;
  change.name = name_;
  change.revision = 7;
  change.record = "record";
  ASSERT_THAT(store->Commit(change), IsOk());
  EXPECT_THAT(store->Commit(change), IsOk());
  change.expected = 7;
  change.revision = 8;
  ASSERT_THAT(store->Commit(change), IsOk());
  EXPECT_THAT(store->Commit(change), IsOk());
  change.revision = 9;
  EXPECT_THAT(store->Commit(change), StatusIs(absl::StatusCode::kAborted, _));
}

TEST_F(RedisStoreTest, TwoServersShareSessionsAndNeverBothCommitOneTurn) {
  const auto a = MakeTable();
  const auto b = MakeTable();
  ASSERT_THAT(a->Create(name_, "m", kShape.digest, StateAt(0), std::nullopt), IsOk());
  ASSERT_THAT(RunTurn(b.get(), name_, 1), IsOk());
  const auto on_a = a->Begin(name_, std::nullopt);
  const auto on_b = b->Begin(name_, std::nullopt);
  ASSERT_THAT(on_a, IsOk());
  ASSERT_THAT(on_b, IsOk());
  EXPECT_EQ((*on_a)->Load(kShape)->token_count, 1);
  EXPECT_THAT((*on_b)->Commit(StateAt(2)), IsOk());
  EXPECT_THAT((*on_a)->Commit(StateAt(3)), StatusIs(absl::StatusCode::kAborted, _));
  EXPECT_EQ(a->Read(name_, std::nullopt, kShape)->state.token_count, 2);
  EXPECT_EQ(a->List("alice", "", 10, "")->sessions.size(), 1u);
}

// Deleting and listing take out the ids of sessions that are gone; one that is made again at that
// moment must not be taken out with them.
// Sizes around those of the allocator are kept in one part or in two.
TEST_F(RedisStoreTest, StatesOfAnySizeAreReadAsTheyWereWritten) {
  const auto store = MakeStore();
  std::vector<uint64_t> obsolete;
  StoreChange change;
  change.name = name_;
  for (const int64_t base : {0, 128, 1024, 12288, 65536, 81920, 1 << 20}) {
    for (const int more : {-300, -11, -7, -6, 0, 1, 10, 105, 2000}) {
      const int64_t size = base + more;
      if (size < 0) continue;
      std::string bytes(static_cast<size_t>(size), 'x');
      for (size_t i = 0; i < bytes.size(); i += 7) bytes[i] = static_cast<char>(i * i >> 3);
      change.revision = NewRevision();
      change.obsolete = obsolete;
      change.checkpoint = std::make_shared<const std::string>(bytes);
      ASSERT_THAT(store->Commit(change), IsOk());
      const auto read = store->ReadCheckpoint(name_, change.revision);
      ASSERT_THAT(read, IsOk());
      EXPECT_EQ(**read, bytes) << bytes.size();
      for (const uint64_t gone : obsolete) {
        EXPECT_THAT(store->ReadCheckpoint(name_, gone), StatusIs(absl::StatusCode::kNotFound, _));
      }
      obsolete = {change.revision};
      change.expected = change.revision;
    }
  }
  // Of those that went nothing is left: v, e, f, r and the last one, which fits two parts.
  RedisConnections redis({.host = "127.0.0.1", .port = redis_->port()});
  const auto fields = redis.Command({"HLEN", "mmfree:session:5:alice:s"});
  ASSERT_THAT(fields, IsOk());
  EXPECT_LE((*fields)->integer, 6);
}

TEST_F(RedisStoreTest, ASessionTakesLittleMoreThanItsState) {
  RedisConnections redis({.host = "127.0.0.1", .port = redis_->port()});
  const auto used = [&]() -> std::pair<int64_t, bool> {
    const auto info = redis.Command({"INFO", "memory"});
    if (!info.ok()) return {0, false};
    const std::string text((*info)->str, (*info)->len);
    int64_t bytes = 0;
    const size_t at = text.find("used_memory:") + 12;
    EXPECT_TRUE(absl::SimpleAtoi(text.substr(at, text.find_first_of("\r\n", at) - at), &bytes));
    return {bytes, text.find("mem_allocator:jemalloc") != std::string::npos};
  };
  const auto before = used();
  if (!before.second) GTEST_SKIP() << "this Redis has another allocator than jemalloc";
  const auto store = MakeStore();
  constexpr int kSessions = 500;
  ASSERT_TRUE(redis_->Command("CONFIG SET appendfsync no"));
  // A power of two and what is around it, a quarter more, in between.
  for (const size_t state : {12288, 16384, 14000, 100'000}) {
    const int64_t start = used().first;
    for (int i = 0; i < kSessions; ++i) {
      StoreChange change;
      change.name = {"alice", absl::StrCat("session-", state, "-", i)};
      change.revision = NewRevision();
      change.record = std::string(128, 'r');
      change.checkpoint = std::make_shared<const std::string>(state + 100, 'x');
      ASSERT_THAT(store->Commit(change), IsOk());
    }
    EXPECT_LE(used().first - start, static_cast<double>(kSessions * (state + 1024)) * 1.1) << state;
  }
}

// A wrong expiry is no reason to take a session for one that has expired, and less so to delete it.
TEST_F(RedisStoreTest, ADamagedExpiryIsDataLoss) {
  const auto store = MakeStore();
  StoreChange change;
  change.name = name_;
  change.revision = 1;
  change.record = "one";
  change.expire_time = absl::Now() + absl::Hours(1);
  ASSERT_THAT(store->Commit(change), IsOk());
  RedisConnections redis({.host = "127.0.0.1", .port = redis_->port()});
  for (const char* damaged : {"1", "0", "x"}) {
    ASSERT_THAT(redis.Command({"HSET", "mmfree:session:5:alice:s", "e", damaged}), IsOk());
    EXPECT_THAT(store->Read(name_), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << damaged;
    StoreChange next = change;
    next.expected = 1;
    next.revision = 2;
    EXPECT_THAT(store->Commit(next), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << damaged;
    // Another one of its name is not made either.
    next.expected.reset();
    EXPECT_THAT(store->Commit(next), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << damaged;
    EXPECT_THAT(store->List("alice", [](const StoredRecord&) { ADD_FAILURE(); }), IsOk());
  }
  EXPECT_THAT(store->Delete(name_), IsOk());
  EXPECT_THAT(store->Commit(change), IsOk());
}

TEST_F(RedisStoreTest, ASessionMadeWhileItsNameIsCleanedUpIsListed) {
  const auto first = MakeTable();
  const auto second = MakeTable();
  constexpr int kRounds = 200;
  for (int round = 0; round < kRounds; ++round) {
    ASSERT_THAT(first->Create(name_, "m", kShape.digest, StateAt(0), std::nullopt), IsOk());
    std::thread remover([&] { ASSERT_THAT(first->Delete(name_), IsOk()); });
    std::thread lister([&] { ASSERT_THAT(first->List(name_.owner, "", 10, ""), IsOk()); });
    absl::StatusOr<SessionInfo> made;
    do {
      made = second->Create(name_, "m", kShape.digest, StateAt(0), std::nullopt);
    } while (absl::IsAlreadyExists(made.status()));
    remover.join();
    lister.join();
    ASSERT_THAT(made, IsOk());
    const auto page = second->List(name_.owner, "", 10, "");
    ASSERT_THAT(page, IsOk());
    ASSERT_EQ(page->sessions.size(), 1) << "in round " << round;
    ASSERT_THAT(second->Delete(name_), IsOk());
  }
}

TEST(RedisAddress, IsHostAndPort) {
  EXPECT_EQ(ParseRedisAddress("localhost:6380")->port, 6380);
  EXPECT_EQ(ParseRedisAddress("localhost:6380")->host, "localhost");
  for (const char* wrong : {"", "localhost", ":1", "h:0", "h:65536", "h:x"}) {
    EXPECT_THAT(ParseRedisAddress(wrong),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("redis://HOST:PORT")));
  }
}

}  // namespace
}  // namespace mmfree
