#include "server/sessions/rocksdb_salvage.h"

#include <rocksdb/db.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_files.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_log.h"
#include "server/sessions/rocksdb_mark.h"
#include "server/sessions/rocksdb_open.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

// Of the entries of a write.
constexpr char kDeletion = 0;
constexpr char kValue = 1;

constexpr size_t kMaxOwnerBytes = 1 << 16;
constexpr size_t kMaxIdBytes = 128;

using Owner = std::string;
using Id = std::string;
// The revision of each session's last change in the log; nullopt: it was deleted.
using Changes = std::map<std::pair<Owner, Id>, std::optional<uint64_t>>;

bool IsIdCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
}

// A number as RocksDB writes lengths, at `*at`, which goes behind it.
std::optional<size_t> ReadVarint(const std::string& bytes, size_t* at) {
  size_t value = 0;
  for (int shift = 0; shift < 32 && *at < bytes.size(); shift += 7) {
    const auto byte = static_cast<unsigned char>(bytes[(*at)++]);
    value |= static_cast<size_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  return std::nullopt;
}

// Notes the change of a record whose entry starts at `at`, if one does: what is around it may be
// damaged, so every place is looked at.
void ReadEntry(const std::string& log, size_t at, Changes* changes) {
  const char kind = log[at++];
  const std::optional<size_t> size = ReadVarint(log, &at);
  if (!size.has_value() || *size <= rocksdb_layout::kKeyHeader ||
      *size > rocksdb_layout::kKeyHeader + kMaxOwnerBytes + kMaxIdBytes ||
      log.size() - at < *size) {
    return;
  }
  SessionName name;
  if (!rocksdb_layout::ParseRecordKey(rocksdb::Slice(&log[at], *size), &name) || name.id.empty() ||
      name.id.size() > kMaxIdBytes || name.owner.size() > kMaxOwnerBytes ||
      !std::all_of(name.id.begin(), name.id.end(), IsIdCharacter)) {
    return;
  }
  at += *size;
  std::optional<uint64_t> revision;
  if (kind == kValue) {
    const std::optional<size_t> value = ReadVarint(log, &at);
    if (!value.has_value() || *value < rocksdb_layout::kValueHeader ||
        log.size() - at < sizeof(uint64_t)) {
      return;
    }
    revision.emplace();
    memcpy(&*revision, &log[at], sizeof(*revision));
  }
  (*changes)[{std::move(name.owner), std::move(name.id)}] = revision;
}

// The changes that can be read, damaged ones included as far as their names and revisions are.
void ReadChanges(const std::string& log, Changes* changes) {
  // Without the headers at the beginnings of blocks an entry that goes through several is whole.
  std::string entries;
  for (size_t block = 0; block < log.size(); block += kRocksDbLogBlock) {
    const absl::string_view bytes = absl::string_view(log).substr(block, kRocksDbLogBlock);
    if (bytes.size() > kRocksDbLogHeader) {
      entries.append(bytes.data() + kRocksDbLogHeader, bytes.size() - kRocksDbLogHeader);
    }
  }
  for (size_t at = 0; at < entries.size(); ++at) {
    if (entries[at] == kDeletion || entries[at] == kValue) ReadEntry(entries, at, changes);
  }
}

absl::string_view Describe(RocksDbSalvage::Loss loss) {
  switch (loss) {
    case RocksDbSalvage::Loss::kBehind:
      return "its last turns are lost";
    case RocksDbSalvage::Loss::kMissing:
      return "lost";
    case RocksDbSalvage::Loss::kBack:
      return "was deleted, and is back";
  }
  return "";
}

std::string List(const RocksDbSalvage& salvage) {
  std::string list;
  for (const RocksDbSalvage::Lost& lost : salvage.lost) {
    absl::StrAppend(&list, absl::CHexEscape(lost.name.owner), "\t", lost.name.id, "\t",
                    Describe(lost.loss), "\n");
  }
  return list;
}

}  // namespace

absl::StatusOr<RocksDbSalvage> SalvageRocksDb(const std::string& directory) {
  RocksDbSalvage salvage;
  salvage.copy =
      absl::StrCat(directory, "/damaged-log-",
                   absl::FormatTime("%Y%m%dT%H%M%E6S", absl::Now(), absl::UTCTimeZone()));
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> logs, FindRocksDbFiles(directory, ".log"));
  std::error_code error;
  fs::create_directory(salvage.copy, error);
  if (error) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot make ", salvage.copy, ": ", error.message()));
  }
  Changes changes;
  for (const fs::path& path : logs) {
    MMFREE_ASSIGN_OR_RETURN(const std::string log, ReadWholeFile(path));
    MMFREE_RETURN_IF_ERROR(WriteWholeFile(fs::path(salvage.copy) / path.filename(), log));
    ReadChanges(log, &changes);
    MMFREE_RETURN_IF_ERROR(WriteWholeFile(path, WriteRocksDbLog(ReadRocksDbLog(log))));
  }

  const uint64_t acknowledged = ReadRocksDbMark(directory);
  MMFREE_RETURN_IF_ERROR(RemoveRocksDbMark(directory));
  MMFREE_ASSIGN_OR_RETURN(const OpenedRocksDb opened,
                          OpenRocksDb(rocksdb_layout::Options(), directory));
  salvage.cut_off = opened.db->GetLatestSequenceNumber() < acknowledged;
  for (const auto& [key, committed] : changes) {
    const SessionName name = {key.first, key.second};
    std::string value;
    const rocksdb::Status read =
        opened.db->Get(rocksdb::ReadOptions(), rocksdb_layout::RecordKey(name), &value);
    std::optional<uint64_t> present;
    if (read.ok() && value.size() >= rocksdb_layout::kValueHeader) {
      present.emplace();
      memcpy(&*present, value.data(), sizeof(*present));
    }
    ++salvage.read;
    if (present == committed) continue;
    salvage.lost.push_back({name, !committed.has_value() ? RocksDbSalvage::Loss::kBack
                                  : present.has_value()  ? RocksDbSalvage::Loss::kBehind
                                                         : RocksDbSalvage::Loss::kMissing});
  }
  MMFREE_RETURN_IF_ERROR(WriteWholeFile(fs::path(salvage.copy) / "sessions.txt", List(salvage)));
  return salvage;
}

}  // namespace mmfree
