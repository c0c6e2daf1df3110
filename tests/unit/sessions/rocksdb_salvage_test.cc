// Logs damaged before their end: refused, and salvaged with a list of what was lost.
#include "server/sessions/rocksdb_salvage.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/rocksdb_log.h"
#include "server/sessions/rocksdb_store.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::_;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;

namespace fs = std::filesystem;

std::string ReadAll(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class RocksDbSalvageTest : public testing::Test {
 protected:
  static constexpr int kSessions = 30;
  static constexpr uint64_t kTurns = 3;

  std::string store() const { return directory_.File("store"); }

  static SessionName Name(int session) { return {"alice", absl::StrCat("session-", session)}; }

  // The marker of a turn's record and checkpoint in the log.
  static std::string Mark(int session, uint64_t turn) {
    return absl::StrCat("<", session, " at ", turn, ">");
  }

  // Turns of some sessions, and the deletion of another; left in the log.
  void Fill() {
    auto store = OpenRocksDbStore({.directory = this->store(), .sync = false, .flush = false});
    ASSERT_THAT(store, IsOk());
    for (uint64_t turn = 1; turn <= kTurns; ++turn) {
      for (int session = 0; session < kSessions; ++session) {
        StoreChange change;
        change.name = Name(session);
        if (turn > 1) change.expected = turn - 1;
        change.revision = turn;
        change.record = Mark(session, turn);
        change.checkpoint = std::make_shared<const std::string>(
            absl::StrCat(std::string(20'000, 'x'), Mark(session, turn)));
        ASSERT_THAT((*store)->Commit(change), IsOk());
      }
    }
    ASSERT_THAT((*store)->Delete(Name(0)), IsOk());
  }

  fs::path Log() const {
    for (const auto& entry : fs::directory_iterator(store())) {
      if (entry.path().extension() == ".log") return entry.path();
    }
    ADD_FAILURE() << "no log";
    return {};
  }

  void Flip(size_t at) const {
    std::fstream file(Log(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(at));
    const char byte = static_cast<char>(file.get() ^ 0x10);
    file.seekp(static_cast<std::streamoff>(at));
    file.put(byte);
  }
  // Damages the record of a turn.
  void Damage(int session, uint64_t turn) const {
    const size_t at = ReadAll(Log()).find(Mark(session, turn));
    ASSERT_NE(at, std::string::npos);
    Flip(at + 1);
  }

  const TempDirectory directory_;
};

TEST_F(RocksDbSalvageTest, TheErrorSaysWhatCanBeDone) {
  Fill();
  Damage(7, 2);
  EXPECT_THAT(OpenRocksDbStore({.directory = store()}),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(store()), HasSubstr("--session_salvage"))));
}

TEST_F(RocksDbSalvageTest, LosesTheDamagedChangesAloneAndNamesTheirSessions) {
  Fill();
  Damage(7, 3);  // the last turn of one
  Damage(9, 2);  // an earlier one: the last is whole
  for (uint64_t turn = 1; turn <= kTurns; ++turn) Damage(11, turn);  // all of one
  const std::string damaged = ReadAll(Log());
  const std::string log_name = Log().filename();

  const absl::StatusOr<RocksDbSalvage> salvage = SalvageRocksDb(store());
  ASSERT_THAT(salvage, IsOk());
  EXPECT_EQ(salvage->read, kSessions);
  ASSERT_THAT(salvage->lost, SizeIs(2));
  EXPECT_EQ(salvage->lost[0].name, Name(11));
  EXPECT_EQ(salvage->lost[0].loss, RocksDbSalvage::Loss::kMissing);
  EXPECT_EQ(salvage->lost[1].name, Name(7));
  EXPECT_EQ(salvage->lost[1].loss, RocksDbSalvage::Loss::kBehind);
  EXPECT_EQ(ReadAll(fs::path(salvage->copy) / log_name), damaged);
  EXPECT_EQ(ReadAll(salvage->copy + "/sessions.txt"),
            "alice\tsession-11\tlost\nalice\tsession-7\tits last turns are lost\n");

  auto store = OpenRocksDbStore({.directory = this->store()});
  ASSERT_THAT(store, IsOk());
  for (int session = 1; session < kSessions; ++session) {
    const absl::StatusOr<StoredRecord> stored = (*store)->Read(Name(session));
    if (session == 11) {
      EXPECT_THAT(stored, StatusIs(absl::StatusCode::kNotFound, _));
      continue;
    }
    ASSERT_THAT(stored, IsOk());
    EXPECT_EQ(stored->revision, session == 7 ? 2u : 3u);
    EXPECT_THAT((*store)->ReadCheckpoint(Name(session), stored->revision), IsOk());
  }
  EXPECT_THAT((*store)->Read(Name(0)), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT((*store)->ReadCheckpoint(Name(9), 2), StatusIs(absl::StatusCode::kNotFound, _));
}

TEST_F(RocksDbSalvageTest, ADeletionThatIsLostIsNamed) {
  Fill();
  const std::string log = ReadAll(Log());
  Flip(log.rfind("session-0") + strlen("session-0"));  // where its checkpoints end
  const absl::StatusOr<RocksDbSalvage> salvage = SalvageRocksDb(store());
  ASSERT_THAT(salvage, IsOk());
  ASSERT_THAT(salvage->lost, SizeIs(1));
  EXPECT_EQ(salvage->lost[0].name, Name(0));
  EXPECT_EQ(salvage->lost[0].loss, RocksDbSalvage::Loss::kBack);
}

TEST_F(RocksDbSalvageTest, ALogThatIsWholeIsWrittenAsItWasRead) {
  Fill();
  const std::string log = ReadAll(Log());
  const std::vector<std::string> writes = ReadRocksDbLog(log);
  EXPECT_THAT(writes, SizeIs(kSessions * kTurns + 1));
  EXPECT_EQ(WriteRocksDbLog(writes), log);
}

// Wherever a bit flips, what is not as it was committed last is named, unless its name is hit.
TEST_F(RocksDbSalvageTest, NothingIsLostWithoutAWord) {
  Fill();
  const std::string whole = ReadAll(Log());
  std::mt19937 random(5);
  for (int round = 0; round < 6; ++round) {
    const TempDirectory copy;
    fs::copy(store(), copy.File("store"), fs::copy_options::recursive);
    const fs::path log = copy.File("store") / Log().filename();
    // In the states, which are nearly all of it, or the headers between them.
    size_t at = random() % (whole.size() * 9 / 10);
    if (round % 2 == 0) {
      at -= at % kRocksDbLogBlock;
    } else {
      while (whole[at] != 'x') ++at;
    }
    std::string bytes = whole;
    bytes[at + random() % (round % 2 == 0 ? kRocksDbLogHeader : 1)] ^= 1 << random() % 7;
    std::ofstream(log, std::ios::binary) << bytes;
    const absl::StatusOr<RocksDbSalvage> salvage = SalvageRocksDb(copy.File("store"));
    ASSERT_THAT(salvage, IsOk());
    EXPECT_LE(salvage->lost.size(), 1u) << "one bit is in one write";
    std::set<std::string> named;
    for (const RocksDbSalvage::Lost& lost : salvage->lost) named.insert(lost.name.id);
    auto opened = OpenRocksDbStore({.directory = copy.File("store")});
    ASSERT_THAT(opened, IsOk());
    for (int session = 0; session < kSessions; ++session) {
      const absl::StatusOr<StoredRecord> stored = (*opened)->Read(Name(session));
      const bool as_committed = session == 0 ? absl::IsNotFound(stored.status())
                                             : stored.ok() && stored->revision == kTurns;
      EXPECT_EQ(!as_committed, named.contains(Name(session).id)) << session << ", byte " << at;
    }
  }
}

// As a crash would leave it, but for what was acknowledged.
TEST_F(RocksDbSalvageTest, ALogThatIsCutOffOrGoneIsNotTakenForACrash) {
  Fill();
  {
    auto store = OpenRocksDbStore({.directory = this->store(), .flush = false});
    ASSERT_THAT(store, IsOk());
    ASSERT_THAT((*store)->Delete(Name(1)), IsOk());
    // A probe that is not acknowledged to anyone.
    ASSERT_THAT((*store)->Probe(100), IsOk());
  }
  const std::string log = ReadAll(Log());
  const fs::path log_name = Log().filename();
  const size_t deletion = log.rfind("session-1");
  ASSERT_NE(deletion, std::string::npos);
  struct Case {
    std::optional<size_t> size;  // none: the log is gone
    bool lacks_changes;
  };
  for (const Case& test : {Case{log.size(), false}, Case{log.size() - 3, false},
                           Case{deletion, true}, Case{0, true}, Case{std::nullopt, true}}) {
    const TempDirectory copy;
    const std::string store = copy.File("store");
    fs::copy(this->store(), store, fs::copy_options::recursive);
    if (test.size.has_value()) {
      fs::resize_file(fs::path(store) / log_name, *test.size);
    } else {
      fs::remove(fs::path(store) / log_name);
    }
    SCOPED_TRACE(test.size.value_or(1));
    if (!test.lacks_changes) {
      EXPECT_THAT(OpenRocksDbStore({.directory = store}), IsOk());
      continue;
    }
    EXPECT_THAT(OpenRocksDbStore({.directory = store}),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr("acknowledged"), HasSubstr("--session_salvage"))));
    const absl::StatusOr<RocksDbSalvage> salvage = SalvageRocksDb(store);
    ASSERT_THAT(salvage, IsOk());
    EXPECT_TRUE(salvage->cut_off);
    const auto opened = OpenRocksDbStore({.directory = store});
    ASSERT_THAT(opened, IsOk());
    EXPECT_THAT((*opened)->Read(Name(2)), IsOk());
  }
}

TEST_F(RocksDbSalvageTest, WhatIsWholeStaysWhole) {
  Fill();
  const absl::StatusOr<RocksDbSalvage> salvage = SalvageRocksDb(store());
  ASSERT_THAT(salvage, IsOk());
  EXPECT_THAT(salvage->lost, SizeIs(0));
  EXPECT_THAT(SalvageRocksDb(directory_.File("none")),
              StatusIs(absl::StatusCode::kFailedPrecondition, _));
}

}  // namespace
}  // namespace mmfree
