// Damaged and truncated files of a RocksDB store: what they held is DATA_LOSS, all else is as it
// was.
#include <prometheus/registry.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/rocksdb_store.h"
#include "server/sessions/session_table.h"
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
    // What was in the log moves into tables and blob files.
    ASSERT_NE(Open(), nullptr);
  }

  std::unique_ptr<SessionTable> Open() {
    auto store = OpenRocksDbStore({.directory = directory_.File("store"), .sync = false});
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
    Flip(blobs[0], at);
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), 1) << "byte " << at;
    Flip(blobs[0], at);
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

// Compaction reads everything: a damaged table or blob must not keep turns from being committed.
TEST_F(RocksDbDamageTest, CommitsGoOnWhenCompactionMeetsDamage) {
  const fs::path table_path = Files(".sst").at(0);
  Flip(table_path, 1500);
  Flip(Files(".blob").at(0), 100'000);
  const auto table = Open();
  ASSERT_NE(table, nullptr) << status_;
  // Enough for several flushes, and then a compaction.
  for (int i = 0; i < 8'000; ++i) {
    const SessionName name = {"zoe", absl::StrCat("n", i % 1'000)};
    if (i < 1'000) {
      ASSERT_THAT(table->Create(name, "m", kShape.digest, StateOf(3), std::nullopt), IsOk());
      continue;
    }
    const auto turn = table->Begin(name, std::nullopt);
    ASSERT_THAT(turn, IsOk());
    ASSERT_THAT((*turn)->Commit(StateOf(3)), IsOk());
  }
  EXPECT_LE(Lost(table.get()), 2);
  EXPECT_TRUE(fs::exists(table_path)) << "a compaction went through";
}

TEST_F(RocksDbDamageTest, WhereverABitFlipsTheStoreOpensOrSaysThatItIsDamaged) {
  const fs::path path = Files(".sst").at(0);
  std::mt19937 random(2);
  for (int round = 0; round < 10; ++round) {
    const size_t at = random() % static_cast<size_t>(fs::file_size(path));
    Flip(path, at);
    if (const auto table = Open()) {
      Lost(table.get());
    } else {
      EXPECT_THAT(status_, StatusIs(absl::StatusCode::kDataLoss, testing::_)) << "byte " << at;
    }
    Flip(path, at);
  }
}

TEST_F(RocksDbDamageTest, ATruncatedOrMissingBlobIsDataLossOfWhatItHeld) {
  const fs::path blob = Files(".blob").at(0);
  // In the log, until the store is opened again.
  const SessionName name = {"bob", "whole"};
  {
    const auto table = Open();
    ASSERT_THAT(table->Create(name, "m", kShape.digest, StateOf(1), std::nullopt), IsOk());
  }
  fs::resize_file(blob, fs::file_size(blob) / 2);
  for (const bool missing : {false, true}) {
    if (missing) fs::remove(blob);
    const auto table = Open();
    ASSERT_NE(table, nullptr) << status_;
    EXPECT_EQ(Lost(table.get()), kSessions);
    EXPECT_THAT(table->Read(name, std::nullopt, kShape), IsOk());
    EXPECT_TRUE(table->store_usable());
  }
  // What is lost can be deleted, and its name used again.
  const auto table = Open();
  EXPECT_THAT(table->Delete(Name(3)), IsOk());
  EXPECT_THAT(table->Create(Name(3), "m", kShape.digest, StateOf(3), std::nullopt), IsOk());
  EXPECT_EQ(Lost(table.get()), kSessions - 1);
}

}  // namespace
}  // namespace mmfree
