#include "server/sessions/session_table.h"

#include <prometheus/registry.h>

#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/memory_store.h"
#include "tests/support/fake_clock.h"
#include "tests/support/metric_reader.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const ModelShape kShape = {.digest = std::string(64, 'a'), .state_floats = 4, .vocab_size = 100};

// A store whose state the test can damage, and which does not say that it is in memory, so that the
// host cache is in front of it.
class BreakableStore final : public SessionStore {
 public:
  BreakableStore(std::unique_ptr<SessionStore> store, absl::Status* fault)
      : store_(std::move(store)), fault_(fault) {}

  absl::string_view name() const override { return "breakable"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return store_->count(); }
  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    if (!fault_->ok()) return *fault_;
    return store_->Read(name);
  }
  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    ++checkpoint_reads_;
    if (name.id == "damaged") return std::make_shared<const std::string>("rubbish");
    if (name.id == "lost") return absl::NotFoundError("lost");
    return store_->ReadCheckpoint(name, revision);
  }
  absl::Status Commit(const StoreChange& change) override {
    if (!fault_->ok()) return *fault_;
    return store_->Commit(change);
  }
  absl::Status Delete(const SessionName& name) override { return store_->Delete(name); }
  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    return store_->List(owner, visit);
  }
  absl::StatusOr<int64_t> RemoveExpired(int64_t limit) override {
    return store_->RemoveExpired(limit);
  }
  absl::Status Probe(int64_t bytes) override { return store_->Probe(bytes); }

  int checkpoint_reads() const { return checkpoint_reads_; }

 private:
  const std::unique_ptr<SessionStore> store_;
  absl::Status* const fault_;
  int checkpoint_reads_ = 0;
};

class SessionTableTest : public testing::Test {
 protected:
  SessionTableTest() { MakeTable({}); }

  void MakeTable(SessionTable::Options options) {
    table_.reset();
    options.clock = &clock_;
    options.sweep_interval = absl::InfiniteDuration();
    options.store_health.interval = absl::InfiniteDuration();
    auto store = std::make_unique<BreakableStore>(
        MakeMemoryStore({.max_bytes = 1 << 20, .clock = &clock_}), &fault_);
    store_ = store.get();
    table_ = std::make_unique<SessionTable>(std::move(options), std::move(store), metrics_.get());
  }

  static SessionState StateAt(int64_t tokens) {
    SessionState state;
    state.state = {1.0f, 2.0f, 3.0f, static_cast<float>(tokens)};
    state.token_count = tokens;
    return state;
  }
  absl::StatusOr<SessionInfo> Create(const std::string& id, const std::string& owner = "alice") {
    clock_.Advance(absl::Seconds(1));
    return table_->Create({owner, id}, "tales", kShape.digest, SessionState(), std::nullopt);
  }
  // Runs one turn, after which `tokens` have been fed.
  absl::StatusOr<SessionInfo> Turn(const SessionName& name, int64_t tokens) {
    auto turn = table_->Begin(name, std::nullopt);
    if (!turn.ok()) return turn.status();
    clock_.Advance(absl::Seconds(1));
    return (*turn)->Commit(StateAt(tokens));
  }
  int64_t TokensAt(const SessionName& name, std::optional<uint64_t> turn = std::nullopt) {
    const auto read = table_->Read(name, turn, kShape);
    EXPECT_THAT(read, IsOk());
    return read.ok() ? read->state.token_count : -1;
  }

  const SessionName name_ = {"alice", "s"};
  FakeClock clock_;
  absl::Status fault_;
  prometheus::Registry registry_;
  std::unique_ptr<SessionMetrics> metrics_ = SessionMetrics::Create(&registry_);
  BreakableStore* store_ = nullptr;
  std::unique_ptr<SessionTable> table_;
};

TEST_F(SessionTableTest, ANewSessionHasFedNothing) {
  const auto made = Create("s");
  ASSERT_THAT(made, IsOk());
  EXPECT_EQ(made->turn, 0u);
  EXPECT_EQ(made->token_count, 0);
  EXPECT_FALSE(made->busy);
  const auto turn = table_->Begin(name_, 0);
  ASSERT_THAT(turn, IsOk());
  const auto state = (*turn)->Load(kShape);
  ASSERT_THAT(state, IsOk());
  EXPECT_TRUE(state->state.empty());
}

TEST_F(SessionTableTest, WithoutAnIdGetsOneOfItsOwn) {
  const auto a = Create("");
  const auto b = Create("");
  EXPECT_EQ(a->name.id.size(), 32u);
  EXPECT_NE(a->name.id, b->name.id);
  EXPECT_THAT(Create(a->name.id), StatusIs(absl::StatusCode::kAlreadyExists, _));
}

TEST_F(SessionTableTest, OnlyACommittedTurnChangesTheSession) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(Turn(name_, 5), IsOk());
  { ASSERT_THAT(table_->Begin(name_, std::nullopt), IsOk()); }  // dropped: cancel, error, deadline
  EXPECT_EQ(table_->Get(name_)->turn, 1u);
  EXPECT_EQ(TokensAt(name_), 5);
  EXPECT_EQ(table_->busy(), 0);
}

TEST_F(SessionTableTest, ASecondTurnIsAbortedWhileOneRuns) {
  ASSERT_THAT(Create("s"), IsOk());
  {
    const auto running = table_->Begin(name_, std::nullopt);
    ASSERT_THAT(running, IsOk());
    EXPECT_THAT(table_->Begin(name_, std::nullopt),
                StatusIs(absl::StatusCode::kAborted, HasSubstr("turn is running")));
    EXPECT_THAT(table_->Rewind(name_, 0), StatusIs(absl::StatusCode::kAborted, _));
    EXPECT_TRUE(table_->Get(name_)->busy);
    EXPECT_EQ(table_->busy(), 1);
  }
  EXPECT_THAT(table_->Begin(name_, std::nullopt), IsOk());
  EXPECT_EQ(table_->busy(), 0);
}

TEST_F(SessionTableTest, ATurnWrittenForAnotherPresentIsAborted) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(Turn(name_, 5), IsOk());
  EXPECT_THAT(table_->Begin(name_, 0),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("is at turn 1, not at 0")));
  EXPECT_THAT(table_->Begin(name_, 1), IsOk());
}

TEST_F(SessionTableTest, TwoServersNeverBothCommitOneTurn) {
  ASSERT_THAT(Create("s"), IsOk());
  const auto turn = table_->Begin(name_, std::nullopt);
  // Another server, which shares the store, commits first.
  auto record = store_->Read(name_);
  StoreChange change;
  change.name = name_;
  change.expected = record->revision;
  change.revision = NewRevision();
  change.record = record->record;
  ASSERT_THAT(store_->Commit(change), IsOk());
  EXPECT_THAT((*turn)->Commit(StateAt(5)), StatusIs(absl::StatusCode::kAborted, _));
}

TEST_F(SessionTableTest, DeletingDuringATurnTellsItAndItCannotCommit) {
  ASSERT_THAT(Create("s"), IsOk());
  const auto turn = table_->Begin(name_, std::nullopt);
  int told = 0;
  (*turn)->OnDelete([&] { ++told; });
  ASSERT_THAT(table_->Delete(name_), IsOk());
  EXPECT_EQ(told, 1);
  EXPECT_TRUE((*turn)->deleted());
  EXPECT_THAT((*turn)->Commit(StateAt(5)),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("deleted")));
  EXPECT_THAT(table_->Get(name_), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(SessionTableTest, ATurnDoesNotCommitIntoANamesakeMadeAfterItsSessionWasDeleted) {
  ASSERT_THAT(Create("s"), IsOk());
  const auto turn = table_->Begin(name_, std::nullopt);
  ASSERT_THAT(table_->Delete(name_), IsOk());
  ASSERT_THAT(Create("s"), IsOk());
  EXPECT_THAT((*turn)->Commit(StateAt(5)), StatusIs(absl::StatusCode::kAborted, _));
  EXPECT_EQ(table_->Get(name_)->turn, 0u);
}

TEST_F(SessionTableTest, ToAnotherOwnerItDoesNotExist) {
  ASSERT_THAT(Create("s"), IsOk());
  const SessionName other = {"bob", "s"};
  EXPECT_THAT(table_->Get(other), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(table_->Begin(other, std::nullopt), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(table_->Delete(other), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(table_->Fork(other, std::nullopt, {"bob", "t"}, std::nullopt),
              StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(table_->Rewind(other, 0), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(table_->Read(other, std::nullopt, kShape), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_TRUE(table_->List("bob", "", 10, "")->sessions.empty());
  EXPECT_THAT(Create("s", "bob"), IsOk());
  EXPECT_EQ(table_->busy(), 0);
}

TEST_F(SessionTableTest, KeepsTheLastTurnsForForkRewindAndExport) {
  MakeTable({.kept_turns = 2});
  ASSERT_THAT(Create("s"), IsOk());
  for (int64_t tokens = 1; tokens <= 5; ++tokens) ASSERT_THAT(Turn(name_, tokens), IsOk());
  EXPECT_EQ(table_->Get(name_)->oldest_turn, 3u);
  EXPECT_EQ(TokensAt(name_, 3), 3);
  EXPECT_THAT(table_->Read(name_, 2, kShape),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("turns 3 to 5")));

  const auto fork = table_->Fork(name_, 4, {"alice", "f"}, std::nullopt);
  ASSERT_THAT(fork, IsOk());
  EXPECT_EQ(fork->turn, 4u);
  EXPECT_EQ(fork->oldest_turn, 4u);
  EXPECT_EQ(TokensAt({"alice", "f"}), 4);
  ASSERT_THAT(Turn({"alice", "f"}, 40), IsOk());
  EXPECT_EQ(TokensAt(name_), 5);

  const auto rewound = table_->Rewind(name_, 3);
  ASSERT_THAT(rewound, IsOk());
  EXPECT_EQ(rewound->turn, 3u);
  EXPECT_FALSE(rewound->busy);
  EXPECT_EQ(TokensAt(name_), 3);
  EXPECT_THAT(table_->Read(name_, 5, kShape), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_EQ(Turn(name_, 33)->turn, 4u);
  EXPECT_EQ(TokensAt(name_), 33);
  EXPECT_EQ(TokensAt(name_, 3), 3);
  EXPECT_THAT(table_->Rewind(name_, 9), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(SessionTableTest, ATurnThatSawTheSessionBeforeARewindCannotCommit) {
  ASSERT_THAT(Create("s"), IsOk());
  for (int64_t tokens = 1; tokens <= 2; ++tokens) ASSERT_THAT(Turn(name_, tokens), IsOk());
  const auto seen = store_->Read(name_);
  ASSERT_THAT(table_->Rewind(name_, 1), IsOk());
  ASSERT_THAT(Turn(name_, 7), IsOk());  // turn 2 again, another one
  StoreChange change;
  change.name = name_;
  change.expected = seen->revision;
  change.revision = NewRevision();
  EXPECT_THAT(store_->Commit(change), StatusIs(absl::StatusCode::kAborted, _));
}

TEST_F(SessionTableTest, KeptTurnsStayWithinTheirBytes) {
  MakeTable({.kept_turns = 100, .kept_bytes = 1000});
  ASSERT_THAT(Create("s"), IsOk());
  for (int64_t tokens = 1; tokens <= 30; ++tokens) ASSERT_THAT(Turn(name_, tokens), IsOk());
  const auto info = table_->Get(name_);
  EXPECT_LE(info->bytes, 1000);
  EXPECT_GT(info->turn, info->oldest_turn);
  MakeTable({.kept_turns = 100, .kept_bytes = 1});
  ASSERT_THAT(Create("s"), IsOk());
  EXPECT_EQ(Turn(name_, 1)->oldest_turn, 1u);
}

TEST_F(SessionTableTest, ListsPagesMostRecentlyUsedFirst) {
  for (const char* id : {"a", "b", "c", "d", "e"}) ASSERT_THAT(Create(id), IsOk());
  ASSERT_THAT(Turn({"alice", "b"}, 1), IsOk());
  std::vector<std::string> ids;
  std::string token;
  int pages = 0;
  do {
    const auto page = table_->List("alice", "tales", 2, token);
    ASSERT_THAT(page, IsOk());
    EXPECT_LE(page->sessions.size(), 2u);
    for (const SessionInfo& info : page->sessions) ids.push_back(info.name.id);
    token = page->next_page_token;
    ++pages;
  } while (!token.empty());
  EXPECT_EQ(pages, 3);
  EXPECT_THAT(ids, ElementsAre("b", "e", "d", "c", "a"));
  EXPECT_TRUE(table_->List("alice", "other", 2, "")->sessions.empty());
  for (const char* wrong : {"x", "MTIz", "!!"}) {
    EXPECT_THAT(table_->List("alice", "", 2, wrong),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("page_token")));
  }
}

TEST_F(SessionTableTest, UseGivesASessionMoreTime) {
  MakeTable({.ttl = absl::Minutes(10)});
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(Create("unused"), IsOk());
  clock_.Advance(absl::Minutes(9));
  ASSERT_THAT(Turn(name_, 1), IsOk());
  clock_.Advance(absl::Minutes(9));
  EXPECT_THAT(table_->Get(name_), IsOk());
  EXPECT_THAT(table_->Get({"alice", "unused"}), StatusIs(absl::StatusCode::kNotFound, _));
  table_->Sweep();
  EXPECT_EQ(store_->count(), 1);
}

TEST_F(SessionTableTest, IdleStatesLeaveTheHostCacheByLruAndComeBack) {
  MakeTable({.kept_turns = 0, .host_cache_bytes = 900});
  for (const char* id : {"a", "b", "c", "d"}) {
    ASSERT_THAT(Create(id), IsOk());
    ASSERT_THAT(Turn({"alice", id}, 7), IsOk());
  }
  EXPECT_EQ(table_->Get({"alice", "d"})->tier, SessionTier::kHost);
  EXPECT_EQ(table_->Get({"alice", "a"})->tier, SessionTier::kStore);
  const int reads = store_->checkpoint_reads();
  EXPECT_EQ(TokensAt({"alice", "d"}), 7);
  EXPECT_EQ(store_->checkpoint_reads(), reads);
  EXPECT_EQ(TokensAt({"alice", "a"}), 7);
  EXPECT_EQ(store_->checkpoint_reads(), reads + 1);
  EXPECT_EQ(table_->Get({"alice", "a"})->tier, SessionTier::kHost);
}

TEST_F(SessionTableTest, DeletedSessionsLeaveNothingInTheHostCacheOrTheMetrics) {
  const auto gauge = [this](const std::string& name) {
    for (const prometheus::MetricFamily& family : registry_.Collect()) {
      if (family.name == name) return family.metric.at(0).gauge.value;
    }
    return -1.0;
  };
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(Create("t"), IsOk());
  ASSERT_THAT(Turn(name_, 3), IsOk());
  EXPECT_EQ(gauge("mmfree_sessions_stored"), 2);
  EXPECT_GT(gauge("mmfree_session_host_cache_bytes"), 0);
  ASSERT_THAT(table_->Delete(name_), IsOk());
  EXPECT_EQ(gauge("mmfree_sessions_stored"), 1);
  ASSERT_THAT(table_->Delete({"alice", "t"}), IsOk());
  EXPECT_EQ(gauge("mmfree_sessions_stored"), 0);
  EXPECT_EQ(gauge("mmfree_session_host_cache_bytes"), 0);
}

TEST_F(SessionTableTest, DamageIsDataLossForThatSessionAlone) {
  MakeTable({.host_cache_bytes = 0});
  for (const char* id : {"damaged", "lost", "whole"}) {
    ASSERT_THAT(Create(id), IsOk());
    ASSERT_THAT(Turn({"alice", id}, 3), IsOk());
  }
  for (const char* id : {"damaged", "lost"}) {
    EXPECT_THAT(table_->Read({"alice", id}, std::nullopt, kShape),
                StatusIs(absl::StatusCode::kDataLoss, _));
    const auto turn = table_->Begin({"alice", id}, std::nullopt);
    ASSERT_THAT(turn, IsOk());
    EXPECT_THAT((*turn)->Load(kShape), StatusIs(absl::StatusCode::kDataLoss, _));
  }
  EXPECT_EQ(TokensAt({"alice", "whole"}), 3);
  EXPECT_EQ(table_->List("alice", "", 10, "")->sessions.size(), 3u);
  EXPECT_THAT(table_->Delete({"alice", "damaged"}), IsOk());
}

TEST_F(SessionTableTest, AStoreThatIsAwayCommitsNothingAndHoldsNothing) {
  ASSERT_THAT(Create("s"), IsOk());
  {
    const auto turn = table_->Begin(name_, std::nullopt);
    ASSERT_THAT(turn, IsOk());
    fault_ = absl::UnavailableError("away");
    EXPECT_THAT((*turn)->Commit(StateAt(5)), StatusIs(absl::StatusCode::kUnavailable, _));
  }
  EXPECT_THAT(table_->Begin(name_, std::nullopt), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_EQ(table_->busy(), 0);
  fault_ = absl::OkStatus();
  EXPECT_EQ(table_->Get(name_)->turn, 0u);
  EXPECT_THAT(Turn(name_, 5), IsOk());
}

TEST_F(SessionTableTest, AnotherModelsSessionIsRefused) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(Turn(name_, 3), IsOk());
  ModelShape other = kShape;
  other.digest = std::string(64, 'b');
  EXPECT_THAT(table_->Read(name_, std::nullopt, other),
              StatusIs(absl::StatusCode::kFailedPrecondition, _));
}

// A table over a device with two places, whose states are read nowhere but there.
class SessionTableDeviceTest : public SessionTableTest {
 protected:
  SessionTableDeviceTest() {
    DevicePool::Options options;
    options.num_slots = 2;
    options.state_floats = kShape.state_floats;
    options.read = [](int32_t, absl::Span<float>) { return absl::OkStatus(); };
    pool_ = std::make_shared<DevicePool>(std::move(options), metrics_.get());
    table_->AddDevice(pool_);
  }
  absl::StatusOr<SessionInfo> TurnOnDevice(const SessionName& name, int64_t tokens) {
    auto turn = table_->Begin(name, std::nullopt);
    if (!turn.ok()) return turn.status();
    SessionState state = StateAt(tokens);
    state.pending = {7};
    state.last_tokens = {5, 6};
    state.device = pool_->Take();
    return (*turn)->Commit(std::move(state));
  }
  // What the next turn goes on from.
  SessionState Present(const SessionName& name) {
    const auto turn = table_->Begin(name, std::nullopt);
    EXPECT_THAT(turn, IsOk());
    absl::StatusOr<SessionState> state = (*turn)->Load(kShape);
    EXPECT_THAT(state, IsOk());
    return state.ok() ? *std::move(state) : SessionState();
  }
  double Resumes(const std::string& tier) const {
    return MetricValue(registry_, "mmfree_session_resumes_total", "tier", tier);
  }

  std::shared_ptr<DevicePool> pool_;
};

TEST_F(SessionTableDeviceTest, ATurnGoesOnFromTheDeviceWithoutReadingTheStore) {
  ASSERT_THAT(Create("s"), IsOk());
  const auto committed = TurnOnDevice(name_, 10);
  ASSERT_THAT(committed, IsOk());
  EXPECT_EQ(committed->tier, SessionTier::kDevice);
  const int reads = store_->checkpoint_reads();
  const SessionState state = Present(name_);
  EXPECT_NE(state.device, nullptr);
  EXPECT_TRUE(state.state.empty());
  EXPECT_EQ(state.token_count, 10);
  EXPECT_EQ(state.turn, 1u);
  EXPECT_THAT(state.pending, ElementsAre(7));
  EXPECT_THAT(state.last_tokens, ElementsAre(5, 6));
  EXPECT_EQ(store_->checkpoint_reads(), reads);
  EXPECT_EQ(Resumes("device"), 1);
}

TEST_F(SessionTableDeviceTest, WhatLeavesTheDeviceComesFromTheOtherTiers) {
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_THAT(Create(id), IsOk());
    ASSERT_THAT(TurnOnDevice({"alice", id}, 10), IsOk());
  }
  const SessionState state = Present({"alice", "a"});
  EXPECT_EQ(state.device, nullptr);
  EXPECT_EQ(state.state, StateAt(10).state);
  EXPECT_THAT(state.pending, ElementsAre(7));
  EXPECT_EQ(Resumes("host"), 1);
  EXPECT_NE(Present({"alice", "c"}).device, nullptr);
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_evictions_total", "tier", "device"), 1);
}

TEST_F(SessionTableDeviceTest, OfASessionOnlyThePresentIsOnTheDevice) {
  ASSERT_THAT(Create("s"), IsOk());
  for (int64_t tokens : {10, 20, 30}) ASSERT_THAT(TurnOnDevice(name_, tokens), IsOk());
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_device_states"), 1);
  EXPECT_EQ(Present(name_).token_count, 30);
  // A turn whose state is on the host alone takes the older copy away.
  ASSERT_THAT(Turn(name_, 40), IsOk());
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_device_states"), 0);
  EXPECT_EQ(Present(name_).token_count, 40);
}

TEST_F(SessionTableDeviceTest, ARewoundSessionGoesOnFromThatTurn) {
  ASSERT_THAT(Create("s"), IsOk());
  for (int64_t tokens : {10, 20}) ASSERT_THAT(TurnOnDevice(name_, tokens), IsOk());
  ASSERT_THAT(table_->Rewind(name_, 1), IsOk());
  const SessionState state = Present(name_);
  EXPECT_EQ(state.token_count, 10);
  EXPECT_EQ(state.state, StateAt(10).state);
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_device_states"), 0);
}

TEST_F(SessionTableDeviceTest, AForkSharesThePlace) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(TurnOnDevice(name_, 10), IsOk());
  ASSERT_THAT(table_->Fork(name_, std::nullopt, {"alice", "copy"}, std::nullopt), IsOk());
  const SessionState copy = Present({"alice", "copy"});
  EXPECT_EQ(copy.token_count, 10);
  EXPECT_EQ(copy.device, Present(name_).device);
  ASSERT_THAT(table_->Delete(name_), IsOk());
  EXPECT_NE(Present({"alice", "copy"}).device, nullptr);
}

TEST_F(SessionTableDeviceTest, DeletedSessionsAndLostTurnsFreeTheirPlaces) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(TurnOnDevice(name_, 10), IsOk());
  fault_ = absl::UnavailableError("away");
  EXPECT_THAT(TurnOnDevice(name_, 20), StatusIs(absl::StatusCode::kUnavailable, _));
  fault_ = absl::OkStatus();
  EXPECT_EQ(Present(name_).token_count, 10);
  {
    auto turn = table_->Begin(name_, std::nullopt);
    ASSERT_THAT(turn, IsOk());
    ASSERT_THAT(table_->Delete(name_), IsOk());
    SessionState state = StateAt(20);
    state.device = pool_->Take();
    EXPECT_THAT((*turn)->Commit(std::move(state)), StatusIs(absl::StatusCode::kAborted, _));
  }
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_device_states"), 0);
  const auto one = pool_->Take();
  const auto two = pool_->Take();
  EXPECT_NE(one, nullptr);
  EXPECT_NE(two, nullptr);
}

// Another server's commit gives the session another revision.
TEST_F(SessionTableDeviceTest, AStaleCopyIsNotUsed) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(TurnOnDevice(name_, 10), IsOk());
  StoredRecord stored = *store_->Read(name_);
  SessionRecord record = *DecodeRecord(stored.record);
  // The other server rewound to the beginning.
  record.kept.pop_back();
  StoreChange change;
  change.name = name_;
  change.expected = stored.revision;
  change.revision = NewRevision();
  change.record = EncodeRecord(record);
  ASSERT_THAT(store_->Commit(change), IsOk());
  const SessionState state = Present(name_);
  EXPECT_EQ(state.device, nullptr);
  EXPECT_EQ(state.token_count, 0);
}

TEST_F(SessionTableDeviceTest, WithoutTheDeviceEverythingIsThere) {
  ASSERT_THAT(Create("s"), IsOk());
  ASSERT_THAT(TurnOnDevice(name_, 10), IsOk());
  pool_->Close();
  EXPECT_EQ(Present(name_).state, StateAt(10).state);
  EXPECT_EQ(table_->Get(name_)->tier, SessionTier::kHost);
}

}  // namespace
}  // namespace mmfree
