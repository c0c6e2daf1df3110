// Damaged and truncated files of a RocksDB store: what they held is DATA_LOSS, all else is as it
// was.
#include <prometheus/registry.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/rocksdb_store.h"
#include "server/sessions/session_table.h"
#include "tests/support/metric_reader.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

constexpr int kSessions = 40;
constexpr int64_t kFloats = 3000;
const ModelShape kShape = {
    .digest = std::string(64, 'a'), .state_floats = kFloats, .vocab_size = 100};

SessionName Name(int session) { return {"alice", absl::StrCat("s", session)}; }

SessionState StateOf(int session) {
  SessionState state;
  std::mt19937 random(static_cast<uint32_t>(session));
  for (int64_t i = 0; i < kFloats; ++i) {
    state.state.push_back(static_cast<float>(random() % 1'000'000) / 1e6f);
  }
  state.token_count = session + 1;
  return state;
}

class RocksDbDamageTest : public testing::Test {
 protected:
  void SetUp() override {
    {
      const auto table = Open();
      ASSERT_NE(table, nullptr);
      for (int session = 0; session < kSessions; ++session) {
        ASSERT_THAT(
            table->Create(Name(session), "m", kShape.digest, StateOf(session), std::nullopt),
            IsOk());
      }
    }
  }

  // As users open it, in another directory, or with tables that stay as they are.
  std::unique_ptr<SessionTable> Open() { return Open({.directory = directory_.File("store")}); }
  std::unique_ptr<SessionTable> Open(RocksDbStoreOptions rocksdb, bool sync = false) {
    rocksdb.sync = sync;
    auto store = OpenRocksDbStore(rocksdb);
    status_ = store.status();
    if (!store.ok()) return nullptr;
    SessionTable::Options options;
    options.sweep_interval = absl::InfiniteDuration();
    options.store_health.interval = absl::InfiniteDuration();
    options.host_cache_bytes = 0;
    return std::make_unique<SessionTable>(options, *std::move(store), metrics_.get());
  }

  std::vector<fs::path> Files(const std::string& extension) const {
    std::vector<fs::path> files;
    for (const auto& entry : fs::directory_iterator(directory_.File("store"))) {
      if (entry.path().extension() == extension) files.push_back(entry.path());
    }
    return files;
  }

  static void Flip(const fs::path& path, size_t at) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(at));
    const char byte = static_cast<char>(file.get() ^ 4);
    file.seekp(static_cast<std::streamoff>(at));
    file.put(byte);
  }

  // Whether that comes, for which there is a lot of time.
  template <typename Condition>
  static bool Comes(const Condition& condition) {
    const absl::Time end = absl::Now() + absl::Seconds(60);
    while (!condition()) {
      if (absl::Now() > end) return false;
      absl::SleepFor(absl::Milliseconds(20));
    }
    return true;
  }

  // Sessions that are lost; the others must be as they were.
  int Lost(SessionTable* table) {
    int lost = 0;
    for (int session = 0; session < kSessions; ++session) {
      const auto read = table->Read(Name(session), std::nullopt, kShape);
      if (read.ok()) {
        EXPECT_EQ(read->state.state, StateOf(session).state) << session;
        continue;
      }
      EXPECT_THAT(read.status(), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << session;
      ++lost;
    }
    return lost;
  }

  const TempDirectory directory_;
  prometheus::Registry registry_;
  std::unique_ptr<SessionMetrics> metrics_ = SessionMetrics::Create(&registry_);
  absl::Status status_;
};

TEST_F(RocksDbDamageTest, AFlippedBitInABlobLosesOneSession) {
  const std::vector<fs::path> blobs = Files(".blob");
  ASSERT_EQ(blobs.size(), 1u);
  const auto size = static_cast<size_t>(fs::file_size(blobs[0]));
  std::mt19937 random(1);
  for (int round = 0; round < 5; ++round) {
    const size_t at = 1000 + random() % (size - 2000);
    const std::string copy = directory_.File(absl::StrCat("copy", round));
    fs::copy(directory_.File("store"), copy);
    Flip(fs::path(copy) / blobs[0].filename(), at);
    const auto table = Open({.directory = copy});
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), 1) << "byte " << at;
  }
}

// A table's block holds the records of many sessions.
TEST_F(RocksDbDamageTest, AFlippedBitInARecordLosesOneSession) {
  const fs::path path = Files(".sst").at(0);
  // Behind the header of its value, in the middle of what is left of it.
  std::ifstream whole(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(whole), {}};
  std::mt19937 random(1);
  for (int round = 0; round < 5; ++round) {
    const size_t digest = bytes.find(kShape.digest, random() % (bytes.size() / 2));
    ASSERT_NE(digest, std::string::npos);
    Flip(path, digest + 5);
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), 1);
    EXPECT_EQ(table->List("alice", "", 1000, "")->sessions.size(), kSessions - 1u);
    // Another one is made beside it, and goes on.
    const SessionName name = {"alice", absl::StrCat("s1-", round)};
    EXPECT_THAT(table->Create(name, "m", kShape.digest, StateOf(1), std::nullopt), IsOk());
    EXPECT_THAT(table->Delete(name), IsOk());
    Flip(path, digest + 5);
  }
}

// Compaction reads everything: a damaged table or blob must not keep turns from being committed,
// nor be met for ever.
TEST_F(RocksDbDamageTest, CommitsGoOnWhenCompactionMeetsDamage) {
  const fs::path table_path = Files(".sst").at(0);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  Flip(table_path, 1500);
  Flip(Files(".blob").at(0), 100'000);
  // Enough for several flushes, and then a compaction.
  for (int i = 0; i < 8'000; ++i) {
    const SessionName name = {"zoe", absl::StrCat("n", i % 1'000)};
    const auto commit = [&]() -> absl::Status {
      if (i < 1'000) {
        return table->Create(name, "m", kShape.digest, StateOf(3), std::nullopt).status();
      }
      const auto turn = table->Begin(name, std::nullopt);
      return turn.ok() ? (*turn)->Commit(StateOf(3)).status() : turn.status();
    };
    absl::Status status = commit();
    // On a slow machine it may be written anew for longer than a call waits.
    Comes([&] {
      if (absl::IsUnavailable(status)) status = commit();
      return !absl::IsUnavailable(status);
    });
    ASSERT_THAT(status, IsOk());
  }
  EXPECT_TRUE(Comes([&] { return !fs::exists(table_path); })) << "no compaction goes through";
  EXPECT_LE(Lost(table.get()), 2);
}

// A compaction has to read the oldest blob file.
TEST_F(RocksDbDamageTest, CommitsGoOnWhenCompactionMissesABlob) {
  const fs::path blob = Files(".blob").at(0);
  for (int i = 0; i < 5; ++i) {
    const auto table = Open({.directory = directory_.File("store"), .compact = false});
    ASSERT_NE(table, nullptr) << status_;
    const SessionName name = {"bob", absl::StrCat("n", i)};
    ASSERT_THAT(table->Create(name, "m", kShape.digest, StateOf(1), std::nullopt), IsOk());
  }
  fs::remove(blob);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  // Before it and after it, whenever that is.
  const absl::Time end = absl::Now() + absl::Seconds(2);
  for (int turn = 0; absl::Now() < end; ++turn) {
    const SessionName name = {"zoe", absl::StrCat("n", turn)};
    ASSERT_THAT(table->Create(name, "m", kShape.digest, StateOf(3), std::nullopt), IsOk()) << turn;
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_TRUE(Comes([&] { return Files(".sst").size() < 4; })) << "no compaction goes through";
  // They are known to be lost, not only to those who ask for them.
  EXPECT_TRUE(Comes([&] {
    table->Sweep();
    return MetricValue(registry_, "mmfree_session_store_lost_sessions") == kSessions;
  }));
  EXPECT_FALSE(table->store_whole());
  EXPECT_EQ(Lost(table.get()), kSessions);
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(table->Read({"bob", absl::StrCat("n", i)}, std::nullopt, kShape), IsOk());
  }
}

// As many as they come to be over many starts: none of these waits for ever, nor any commit.
TEST_F(RocksDbDamageTest, DamageDoesNotKeepManyTablesFromBeingCompacted) {
  const fs::path blob = Files(".blob").at(0);
  Flip(blob, static_cast<size_t>(fs::file_size(blob)) / 2);
  for (int i = 0; i < 40; ++i) {
    const auto table = Open({.directory = directory_.File("store"), .compact = false});
    ASSERT_NE(table, nullptr) << status_;
    const SessionName name = {"bob", absl::StrCat("n", i)};
    ASSERT_THAT(table->Create(name, "m", kShape.digest, StateOf(i), std::nullopt), IsOk());
  }
  EXPECT_GT(Files(".sst").size(), 36u);
  {
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_THAT(table->Create({"bob", "new"}, "m", kShape.digest, StateOf(1), std::nullopt),
                IsOk());
    EXPECT_TRUE(Comes([&] { return Files(".sst").size() < 4; })) << Files(".sst").size();
    // The state is taken out on the way.
    EXPECT_TRUE(Comes([&] { return !table->store_whole(); }));
    table->Sweep();
    EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 1);
    EXPECT_EQ(Lost(table.get()), 1);
  }
  // That it is lost is not forgotten, until it is deleted.
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 1);
  for (int session = 0; session < kSessions; ++session) {
    if (table->Read(Name(session), std::nullopt, kShape).ok()) continue;
    EXPECT_THAT(table->Delete(Name(session)), IsOk());
    EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 0);
    EXPECT_TRUE(table->store_whole());
  }
}

// Who asks for it finds it out.
TEST_F(RocksDbDamageTest, ALostStateIsCountedWhenItIsRead) {
  const fs::path blob = Files(".blob").at(0);
  Flip(blob, static_cast<size_t>(fs::file_size(blob)) / 2);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_TRUE(table->store_whole());
  EXPECT_EQ(Lost(table.get()), 1);
  EXPECT_FALSE(table->store_whole());
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 1);
}

// Of a session that can go back to a turn that is whole only the present is lost.
TEST_F(RocksDbDamageTest, ARewindEndsALoss) {
  const fs::path store = directory_.File("store");
  const std::vector<fs::path> before = Files(".blob");
  {
    const auto table = Open({.directory = store, .compact = false});
    const auto turn = table->Begin(Name(7), std::nullopt);
    ASSERT_THAT(turn, IsOk());
    ASSERT_THAT((*turn)->Commit(StateOf(1)), IsOk());
  }
  for (const fs::path& blob : Files(".blob")) {
    if (std::count(before.begin(), before.end(), blob) == 0) fs::remove(blob);
  }
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_EQ(Lost(table.get()), 1);
  EXPECT_FALSE(table->store_whole());
  EXPECT_THAT(table->Rewind(Name(7), StateOf(7).turn), IsOk());
  EXPECT_TRUE(table->store_whole());
  EXPECT_EQ(Lost(table.get()), 0);
}

TEST_F(RocksDbDamageTest, AMissingBlobIsDataLossOfWhatItHeld) {
  // Of another blob file, from when the store is closed.
  const SessionName name = {"bob", "whole"};
  const fs::path blob = Files(".blob").at(0);
  ASSERT_THAT(Open()->Create(name, "m", kShape.digest, StateOf(1), std::nullopt), IsOk());
  fs::remove(blob);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_EQ(Lost(table.get()), kSessions);
  EXPECT_THAT(table->Read(name, std::nullopt, kShape), IsOk());
  EXPECT_TRUE(table->store_usable());
  // What is lost can be deleted, and its name used again.
  EXPECT_THAT(table->Delete(Name(3)), IsOk());
  EXPECT_THAT(table->Create(Name(3), "m", kShape.digest, StateOf(3), std::nullopt), IsOk());
  EXPECT_EQ(Lost(table.get()), kSessions - 1);
}

TEST_F(RocksDbDamageTest, ATruncatedBlobLosesWhatWasCutOff) {
  const fs::path blob = Files(".blob").at(0);
  const auto size = static_cast<double>(fs::file_size(blob));
  fs::resize_file(blob, static_cast<size_t>(size * 3 / 4));
  for (int round = 0; round < 2; ++round) {
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_NEAR(Lost(table.get()), kSessions / 4, 1);
  }
}

TEST_F(RocksDbDamageTest, ATruncatedTableLosesWhatWasCutOff) {
  // Its end is an index and more; all sessions' records are in front of it, in their order.
  const fs::path path = Files(".sst").at(0);
  const std::string bytes = ReadFile(path);
  size_t cut = std::string::npos;
  for (int record = 0; record < 10; ++record) cut = bytes.rfind(kShape.digest, cut) - 1;
  fs::resize_file(path, cut);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_EQ(Lost(table.get()), 10);
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 10);
  // None is made up.
  EXPECT_THAT(table->Get({"alice", "s9-not"}), StatusIs(absl::StatusCode::kNotFound, testing::_));
  EXPECT_THAT(table->Get({"zoe", "s9"}), StatusIs(absl::StatusCode::kNotFound, testing::_));
  for (int session = 0; session < kSessions; ++session) {
    if (!absl::IsDataLoss(table->Get(Name(session)).status())) continue;
    EXPECT_THAT(table->Delete(Name(session)), IsOk());
    EXPECT_THAT(table->Create(Name(session), "m", kShape.digest, StateOf(session), std::nullopt),
                IsOk());
  }
  EXPECT_EQ(Lost(table.get()), 0);
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), 0);
}

// What is in other tables between the keys of a damaged block is not lost with it.
TEST_F(RocksDbDamageTest, ADamagedTableDoesNotCostTheSessionsOfOthers) {
  const fs::path older = Files(".sst").at(0);
  {
    const auto table = Open({.directory = directory_.File("store"), .compact = false});
    ASSERT_NE(table, nullptr) << status_;
    for (int session = 0; session < kSessions; session += 2) {
      const auto turn = table->Begin(Name(session), std::nullopt);
      ASSERT_THAT(turn, IsOk());
      ASSERT_THAT((*turn)->Commit(StateOf(session)), IsOk());
    }
  }
  const std::vector<fs::path> tables = Files(".sst");
  ASSERT_EQ(tables.size(), 2u);
  const fs::path newer = tables[0] == older ? tables[1] : tables[0];
  std::string bytes = ReadFile(newer);
  const size_t first = bytes.find(kShape.digest);
  const size_t last = bytes.rfind(kShape.digest);
  std::fill(bytes.begin() + static_cast<ptrdiff_t>(first),
            bytes.begin() + static_cast<ptrdiff_t>(last), '\xee');
  WriteFile(newer, bytes);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  int lost = 0;
  int lost_of_others = 0;
  for (int session = 0; session < kSessions; ++session) {
    const auto read = table->Read(Name(session), std::nullopt, kShape);
    if (read.ok()) continue;
    EXPECT_THAT(read.status(), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << session;
    ++(session % 2 == 1 ? lost_of_others : lost);
  }
  EXPECT_GE(lost, kSessions / 2 - 2);
  // The table's filter, which has keys that are random, errs once in a hundred.
  EXPECT_LE(lost_of_others, 5);
  EXPECT_EQ(MetricValue(registry_, "mmfree_session_store_lost_sessions"), lost + lost_of_others);
}

TEST_F(RocksDbDamageTest, AnIndexOrAListOfFilesThatIsDamagedLosesNothing) {
  for (const bool list : {false, true}) {
    if (list) {
      fs::remove(directory_.File("store/CURRENT"));
    } else {
      const fs::path path = Files(".sst").at(0);
      fs::resize_file(path, fs::file_size(path) - 1);
    }
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), 0);
  }
}

// The new files are there, and the old ones are moved away file by file.
TEST_F(RocksDbDamageTest, ARebuildThatWasInterruptedIsFinished) {
  const fs::path store = directory_.File("store");
  fs::create_directory(store / "rebuilding");
  WriteFile(store / "rebuilding" / "000001.sst", "half of it");
  fs::create_directory(store / "rebuilt-T");
  for (const auto& entry : fs::directory_iterator(store)) {
    if (entry.is_regular_file() && entry.path().filename() != "LOCK") {
      fs::copy_file(entry, store / "rebuilt-T" / entry.path().filename());
    }
  }
  fs::create_directory(store / "damaged-files-T");
  fs::rename(store / "CURRENT", store / "damaged-files-T" / "CURRENT");
  {
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), 0);
  }
  EXPECT_FALSE(fs::exists(store / "rebuilt-T"));
  EXPECT_TRUE(fs::exists(store / "damaged-files-T" / "CURRENT"));

  // Now the old ones are moved, and of the new ones some are in their place.
  fs::create_directory(store / "rebuilt-U");
  WriteFile(store / "rebuilt-U" / "old-files-moved", "");
  fs::rename(store / "CURRENT", store / "rebuilt-U" / "CURRENT");
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  EXPECT_EQ(Lost(table.get()), 0);
}

// Tables of several ages, changes and deletions in them and in the log, and one file of it damaged
// anywhere: the store opens, or says that it is the log, cut off as by a crash or not; what was
// committed is there or DATA_LOSS.
TEST_F(RocksDbDamageTest, WhateverIsDamagedNothingIsLostInSilence) {
  constexpr int kDeleted = 5;
  const std::string closed = directory_.File("store");
  const std::string crashed = directory_.File("crashed");
  std::vector<int> last(kSessions);  // the state that was committed last
  std::mt19937 random(3);
  int next = 1000;
  const auto take_turns = [&](SessionTable* table, int turns) {
    for (int i = 0; i < turns; ++i) {
      const int session = kDeleted + static_cast<int>(random() % (kSessions - kDeleted));
      const auto turn = table->Begin(Name(session), std::nullopt);
      ASSERT_THAT(turn, IsOk());
      last[static_cast<size_t>(session)] = next;
      ASSERT_THAT((*turn)->Commit(StateOf(next++)), IsOk());
    }
  };
  for (int session = 0; session < kSessions; ++session)
    last[static_cast<size_t>(session)] = session;
  for (int round = 0; round < 3; ++round) {
    const auto table = Open({.directory = closed, .compact = false});
    take_turns(table.get(), 30);
    ASSERT_THAT(table->Delete(Name(round)), IsOk());
  }
  {
    const auto table = Open({.directory = closed, .flush = false, .compact = false}, /*sync=*/true);
    take_turns(table.get(), 10);
    for (int session = 3; session < kDeleted; ++session) {
      ASSERT_THAT(table->Delete(Name(session)), IsOk());
    }
  }
  fs::copy(closed, crashed);
  ASSERT_NE(Open({.directory = closed, .compact = false}), nullptr);  // and closed as usual

  int opened = 0;
  int intact = 0;
  for (int round = 0; round < 28; ++round) {
    const std::string store = directory_.File("damaged");
    fs::remove_all(store);
    fs::copy(random() % 2 == 0 ? closed : crashed, store);
    std::vector<fs::path> files;
    for (const auto& entry : fs::directory_iterator(store)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    const fs::path file = files[random() % files.size()];
    const auto size = static_cast<size_t>(fs::file_size(file));
    const bool log = file.extension() == ".log";
    const size_t at = size == 0 ? 0 : random() % size;
    const uint32_t kind = random() % 5;
    if (kind == 0) {
      fs::remove(file);
    } else if (kind == 1) {
      fs::resize_file(file, at);
    } else if (size > 0) {
      Flip(file, at);
    }
    SCOPED_TRACE(absl::StrCat("round ", round, ", kind ", kind, " at ", at, " of ", size, ", ",
                              file.filename().string()));
    // Where a compaction meets it, RocksDB rests for a second: not in every round.
    const auto table = Open({.directory = store, .compact = round % 8 == 2});
    if (table == nullptr) {
      EXPECT_TRUE(log) << status_;
      EXPECT_THAT(status_,
                  StatusIs(absl::StatusCode::kDataLoss, testing::HasSubstr("--session_salvage")));
      continue;
    }
    ++opened;
    int lost = 0;
    for (int session = 0; session < kSessions; ++session) {
      const auto read = table->Read(Name(session), std::nullopt, kShape);
      if (session < kDeleted) {
        EXPECT_THAT(read.status(),
                    testing::AnyOf(StatusIs(absl::StatusCode::kNotFound, testing::_),
                                   StatusIs(absl::StatusCode::kDataLoss, testing::_)))
            << session;
      } else if (read.ok()) {
        EXPECT_EQ(read->state.state, StateOf(last[static_cast<size_t>(session)]).state) << session;
      } else {
        EXPECT_THAT(read.status(), StatusIs(absl::StatusCode::kDataLoss, testing::_)) << session;
        ++lost;
      }
    }
    if (lost == 0) ++intact;
    // A damaged length takes with it those up to the next whole key in its block.
    EXPECT_LE(lost, kind >= 2 ? 16 : kSessions);
    // It can be used, and then it is not damaged any more but for what is lost.
    EXPECT_THAT(table->Create({"bob", "new"}, "m", kShape.digest, StateOf(1), std::nullopt),
                IsOk());
    EXPECT_THAT(table->Read({"bob", "new"}, std::nullopt, kShape), IsOk());
  }
  EXPECT_GT(opened, 18);
  EXPECT_GT(intact, 4);
}

}  // namespace
}  // namespace mmfree
