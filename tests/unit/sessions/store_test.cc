// One suite for every store: what store.h promises.
#include "server/sessions/store.h"

#include <sys/mount.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/memory_store.h"
#ifdef MMFREE_HAVE_REDIS
#include "server/sessions/redis_store.h"
#include "tests/support/redis_process.h"
#endif
#ifdef MMFREE_HAVE_ROCKSDB
#include "server/sessions/rocksdb_store.h"
#endif
#include "tests/support/fake_clock.h"
#include "tests/support/patience.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::HasSubstr;

struct StoreKind {
  std::string name;
  bool survives = false;  // reopening
  std::function<absl::StatusOr<std::unique_ptr<SessionStore>>(const std::string& directory,
                                                              const Clock* clock)>
      open;
};

std::vector<StoreKind> Kinds() {
  std::vector<StoreKind> kinds;
  kinds.push_back({"Memory", false, [](const std::string&, const Clock* clock) {
                     return MakeMemoryStore({.max_bytes = 1 << 20, .clock = clock});
                   }});
#ifdef MMFREE_HAVE_ROCKSDB
  kinds.push_back({"RocksDb", true, [](const std::string& directory, const Clock* clock) {
                     return OpenRocksDbStore({.directory = directory, .clock = clock});
                   }});
#endif
#ifdef MMFREE_HAVE_REDIS
  kinds.push_back({"Redis", true,
                   [](const std::string& directory,
                      const Clock* clock) -> absl::StatusOr<std::unique_ptr<SessionStore>> {
                     // A server of its own for each test, which its directory stands for.
                     static std::string test;
                     static std::unique_ptr<RedisProcess> redis;
                     if (directory != test) redis = RedisProcess::Start();
                     test = directory;
                     if (redis == nullptr) return absl::NotFoundError("no redis-server");
                     RedisStoreOptions options;
                     options.host = "127.0.0.1";
                     options.port = redis->port();
                     options.clock = clock;
                     return MakeRedisStore(options);
                   }});
#endif
  return kinds;
}

class StoreTest : public testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override { Open(); }

  void Open() {
    store_.reset();
    auto store = GetParam().open(directory_.path(), &clock_);
    if (absl::IsNotFound(store.status())) GTEST_SKIP() << store.status();
    ASSERT_THAT(store, IsOk());
    store_ = *std::move(store);
  }

  StoreChange Change(const SessionName& name, std::optional<uint64_t> expected, uint64_t revision,
                     const std::string& record) {
    StoreChange change;
    change.name = name;
    change.expected = expected;
    change.revision = revision;
    change.record = record;
    change.last_use_time = clock_.Now();
    change.checkpoint = std::make_shared<const std::string>(record + "'s checkpoint");
    return change;
  }
  absl::Status Create(const SessionName& name, uint64_t revision, const std::string& record) {
    return store_->Commit(Change(name, std::nullopt, revision, record));
  }
  std::multiset<std::string> Listed(const std::string& owner) {
    std::multiset<std::string> records;
    EXPECT_THAT(
        store_->List(owner, [&](const StoredRecord& stored) { records.insert(stored.record); }),
        IsOk());
    return records;
  }
  void ExpectGone(const SessionName& name, uint64_t revision) {
    EXPECT_THAT(store_->Read(name), StatusIs(absl::StatusCode::kNotFound, HasSubstr(name.id)));
    EXPECT_THAT(store_->ReadCheckpoint(name, revision), StatusIs(absl::StatusCode::kNotFound, _));
  }

  const SessionName name_ = {"alice", "s"};
  TempDirectory directory_;
  FakeClock clock_;
  std::unique_ptr<SessionStore> store_;
};

TEST_P(StoreTest, GivesBackWhatWasCommitted) {
  ASSERT_THAT(Create(name_, 7, "one"), IsOk());
  const auto stored = store_->Read(name_);
  ASSERT_THAT(stored, IsOk());
  EXPECT_EQ(stored->revision, 7u);
  EXPECT_EQ(stored->record, "one");
  EXPECT_EQ(stored->expire_time, absl::InfiniteFuture());
  EXPECT_EQ(**store_->ReadCheckpoint(name_, 7), "one's checkpoint");
  EXPECT_THAT(store_->ReadCheckpoint(name_, 8), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_P(StoreTest, AChangeAppliesOnlyToTheRevisionItsAuthorSaw) {
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  ASSERT_THAT(store_->Commit(Change(name_, 1, 2, "two")), IsOk());
  EXPECT_THAT(store_->Commit(Change(name_, 1, 3, "late")), StatusIs(absl::StatusCode::kAborted, _));
  EXPECT_EQ(store_->Read(name_)->record, "two");
  EXPECT_THAT(store_->ReadCheckpoint(name_, 3), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store_->Commit(Change({"alice", "t"}, 1, 2, "x")),
              StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_P(StoreTest, ASessionIsMadeOnce) {
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  EXPECT_THAT(Create(name_, 2, "two"), StatusIs(absl::StatusCode::kAlreadyExists, _));
  EXPECT_EQ(store_->Read(name_)->record, "one");
}

TEST_P(StoreTest, ObsoleteCheckpointsGoWithTheChange) {
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  StoreChange change = Change(name_, 1, 2, "two");
  change.obsolete = {1};
  ASSERT_THAT(store_->Commit(change), IsOk());
  EXPECT_THAT(store_->ReadCheckpoint(name_, 1), StatusIs(absl::StatusCode::kNotFound, _));
  change = Change(name_, 2, 3, "three");
  change.checkpoint = nullptr;
  ASSERT_THAT(store_->Commit(change), IsOk());
  EXPECT_THAT(store_->ReadCheckpoint(name_, 2), IsOk());
  EXPECT_THAT(store_->ReadCheckpoint(name_, 3), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_P(StoreTest, OwnersDoNotMeet) {
  // Names that a careless key would confuse.
  const std::vector<SessionName> names = {{"", "s"},   {"a", "s"},  {"as", ""},
                                          {"a", "ss"}, {"as", "s"}, {std::string("a\0", 2), "s"}};
  uint64_t revision = 0;
  for (const SessionName& name : names) {
    ++revision;
    ASSERT_THAT(Create(name, revision, absl::StrCat(revision)), IsOk());
  }
  for (size_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ(store_->Read(names[i])->record, absl::StrCat(i + 1));
  }
  EXPECT_EQ(Listed("a"), (std::multiset<std::string>{"2", "4"}));
  EXPECT_EQ(Listed("as"), (std::multiset<std::string>{"3", "5"}));
  ASSERT_THAT(store_->Delete(names[1]), IsOk());
  ExpectGone(names[1], 2);
  EXPECT_THAT(store_->ReadCheckpoint(names[3], 4), IsOk());
}

TEST_P(StoreTest, ListsEverySessionOfAnOwnerOnce) {
  std::multiset<std::string> expected;
  for (uint64_t i = 1; i <= 260; ++i) {  // more than a store reads at once
    const std::string id = absl::StrCat("session", i);
    ASSERT_THAT(Create({"alice", id}, i, id), IsOk());
    expected.insert(id);
  }
  ASSERT_THAT(store_->Delete({"alice", "session100"}), IsOk());
  expected.erase("session100");
  EXPECT_EQ(Listed("alice"), expected);
}

TEST_P(StoreTest, DeletedIsGoneWithItsCheckpoints) {
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  ASSERT_THAT(store_->Commit(Change(name_, 1, 2, "two")), IsOk());
  ASSERT_THAT(store_->Delete(name_), IsOk());
  ExpectGone(name_, 1);
  ExpectGone(name_, 2);
  EXPECT_THAT(store_->Delete(name_), StatusIs(absl::StatusCode::kNotFound, _));
  ASSERT_THAT(Create(name_, 3, "again"), IsOk());
  EXPECT_THAT(store_->ReadCheckpoint(name_, 1), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_P(StoreTest, ExpiredIsGoneBeforeItIsRemovedAndItsNameIsFree) {
  for (const char* id : {"a", "b"}) {
    StoreChange change = Change({"alice", id}, std::nullopt, 1, id);
    change.expire_time = clock_.Now() + absl::Minutes(1);
    ASSERT_THAT(store_->Commit(change), IsOk());
  }
  ASSERT_THAT(Create({"alice", "c"}, 1, "c"), IsOk());
  EXPECT_EQ(Listed("alice"), (std::multiset<std::string>{"a", "b", "c"}));
  clock_.Advance(absl::Minutes(1));
  ExpectGone({"alice", "a"}, 9);
  EXPECT_EQ(Listed("alice"), (std::multiset<std::string>{"c"}));
  EXPECT_THAT(store_->Delete({"alice", "a"}), StatusIs(absl::StatusCode::kNotFound, _));
  ASSERT_THAT(Create({"alice", "b"}, 2, "new"), IsOk());
  EXPECT_THAT(store_->ReadCheckpoint({"alice", "b"}, 1), StatusIs(absl::StatusCode::kNotFound, _));
  // Redis removes what expires by itself, and does not count what others share.
  if (store_->count().has_value()) {
    EXPECT_EQ(*store_->RemoveExpired(10), 1);
    EXPECT_EQ(*store_->RemoveExpired(10), 0);
    EXPECT_EQ(store_->count(), 2);
  }
  EXPECT_EQ(Listed("alice"), (std::multiset<std::string>{"c", "new"}));
}

TEST_P(StoreTest, OfManyConcurrentChangesOneWins) {
  ASSERT_THAT(Create(name_, 1, "0"), IsOk());
  constexpr int kThreads = 4;
  constexpr int kRounds = 10;
  std::atomic<int> committed{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kRounds; ++i) {
        const auto stored = store_->Read(name_);
        ASSERT_THAT(stored, IsOk());
        const int next = std::stoi(stored->record) + 1;
        const absl::Status status =
            store_->Commit(Change(name_, stored->revision, NewRevision(), absl::StrCat(next)));
        ASSERT_TRUE(status.ok() || absl::IsAborted(status)) << status;
        if (status.ok()) ++committed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(committed.load(), kRounds);
  EXPECT_EQ(store_->Read(name_)->record, absl::StrCat(committed.load()));
}

TEST_P(StoreTest, AProbeLeavesNothingThatLooksLikeASession) {
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  for (const int64_t bytes : {0, 100, 100'000, 4096}) EXPECT_THAT(store_->Probe(bytes), IsOk());
  EXPECT_EQ(Listed(name_.owner), (std::multiset<std::string>{"one"}));
  EXPECT_EQ(Listed(""), std::multiset<std::string>());
  EXPECT_EQ(*store_->RemoveExpired(10), 0);
  const std::optional<int64_t> count = store_->count();
  Open();
  if (GetParam().survives) {
    EXPECT_EQ(store_->count(), count);
  }
}

TEST_P(StoreTest, KeepsWhatWasCommittedWhenReopened) {
  if (!GetParam().survives) GTEST_SKIP() << "a memory store ends with its process";
  const std::string large(100'000, 'x');
  ASSERT_THAT(Create(name_, 1, "one"), IsOk());
  ASSERT_THAT(Create({"bob", "t"}, 2, large), IsOk());
  Open();
  EXPECT_EQ(store_->Read(name_)->revision, 1u);
  EXPECT_EQ(**store_->ReadCheckpoint({"bob", "t"}, 2), large + "'s checkpoint");
}

INSTANTIATE_TEST_SUITE_P(All, StoreTest, testing::ValuesIn(Kinds()),
                         [](const auto& info) { return info.param.name; });

TEST(MemoryStore, RefusesSessionsAboveItsBudgetButNotTurns) {
  const auto store = MakeMemoryStore({.max_bytes = 1000});
  StoreChange change;
  change.name = {"", "a"};
  change.revision = 1;
  change.checkpoint = std::make_shared<const std::string>(2000, 'x');
  ASSERT_THAT(store->Commit(change), IsOk());
  change.name.id = "b";
  EXPECT_THAT(store->Commit(change),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("--session_memory_mb")));
  change.name.id = "a";
  change.expected = 1;
  change.revision = 2;
  EXPECT_THAT(store->Commit(change), IsOk());
  ASSERT_THAT(store->Delete(change.name), IsOk());
  change.expected = std::nullopt;
  EXPECT_THAT(store->Commit(change), IsOk());
}

#ifdef MMFREE_HAVE_ROCKSDB
TEST(RocksDbStore, ADirectoryIsOneProcessAtATime) {
  const TempDirectory directory;
  const auto first = OpenRocksDbStore({.directory = directory.path()});
  ASSERT_THAT(first, IsOk());
  EXPECT_THAT(OpenRocksDbStore({.directory = directory.path()}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(directory.path())));
}

// Leaves no more than `free` bytes of the file system that `file` is in.
void FillDisk(const std::string& file, uintmax_t free) {
  std::ofstream out(file, std::ios::binary);
  const std::string block(4096, 'x');
  while (std::filesystem::space(file).available > free &&
         out.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) {
  }
}

TEST(RocksDbStore, AFullDiskFailsChangesAndNotTheProcess) {
  const TempDirectory directory;
  if (mount("tmpfs", directory.path().c_str(), "tmpfs", 0, "size=40m,mode=700") != 0) {
    GTEST_SKIP() << "cannot mount a file system here";
  }
  const absl::Cleanup unmount = [&] { umount2(directory.path().c_str(), MNT_DETACH); };
  FillDisk(directory.File("reserve"), 4 << 20);  // too little left for RocksDB to set space aside
  auto store = OpenRocksDbStore({.directory = directory.File("store")});
  ASSERT_THAT(store, IsOk());
  StoreChange change;
  change.name = {"", "a"};
  change.revision = 1;
  change.checkpoint = std::make_shared<const std::string>(20'000, 'x');
  ASSERT_THAT((*store)->Commit(change), IsOk());
  FillDisk(directory.File("ballast"), 0);
  change.expected = 1;
  change.revision = 2;
  EXPECT_THAT((*store)->Commit(change),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("No space left")));
  EXPECT_THAT((*store)->Commit(change), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_EQ((*store)->Read(change.name)->revision, 1u);
  EXPECT_THAT((*store)->Probe(4096), StatusIs(absl::StatusCode::kUnavailable, _));
  // With room again it goes on by itself, which RocksDB finds out every five seconds, and is whole
  // when it is opened anew.
  std::filesystem::remove(directory.File("ballast"));
  std::filesystem::remove(directory.File("reserve"));
  const absl::Time give_up = absl::Now() + Patience(absl::Minutes(1));
  while (!(*store)->Probe(4096).ok() && absl::Now() < give_up) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_THAT((*store)->Commit(change), IsOk());
  change.expected = 2;
  change.revision = 3;
  store->reset();
  store = OpenRocksDbStore({.directory = directory.File("store")});
  ASSERT_THAT(store, IsOk());
  EXPECT_EQ((*store)->Read(change.name)->revision, 2u);
  EXPECT_THAT((*store)->Commit(change), IsOk());
}
#endif

}  // namespace
}  // namespace mmfree
