#include "server/sessions/rocksdb_rebuild.h"

#include <fcntl.h>
#include <rocksdb/db.h>
#include <rocksdb/write_batch.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/base/status_macros.h"
#include "server/sessions/checkpoint.h"
#include "server/sessions/rocksdb_blob.h"
#include "server/sessions/rocksdb_files.h"
#include "server/sessions/rocksdb_gather.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/session_record.h"
#include "server/sessions/store.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

// Directories in the database's. A new database is made in the first one; renamed to the second
// name, with a time behind it, it is what the database is now, whatever else lies there.
constexpr char kUnfinished[] = "rebuilding";
constexpr char kFinished[] = "rebuilt-";
constexpr char kOldFiles[] = "damaged-files-";
// In the finished one: the old files are out of the way.
constexpr char kOldFilesMoved[] = "old-files-moved";

absl::Status FromError(const std::error_code& error, absl::string_view what, const fs::path& path) {
  if (!error) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(what, " ", path.string(), ": ", error.message()));
}

absl::Status FromRocksDb(const rocksdb::Status& status, absl::string_view what) {
  if (status.ok()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(what, ": ", status.ToString()));
}

// Makes the names in a directory durable.
absl::Status SyncDirectory(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = file >= 0 && fsync(file) == 0;
  const int failure = errno;
  if (file >= 0) close(file);
  if (synced) return absl::OkStatus();
  return FromError({failure, std::generic_category()}, "cannot sync", path);
}

// But for what processes lock, which stays where it is.
absl::Status MoveFiles(const fs::path& from, const fs::path& to, absl::string_view except) {
  std::error_code error;
  std::vector<fs::path> files;
  for (fs::directory_iterator it(from, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (it->is_regular_file() && name != except && name != "LOCK") files.push_back(it->path());
  }
  MMFREE_RETURN_IF_ERROR(FromError(error, "cannot list", from));
  for (const fs::path& file : files) {
    fs::rename(file, to / file.filename(), error);
    MMFREE_RETURN_IF_ERROR(FromError(error, "cannot move", file));
  }
  MMFREE_RETURN_IF_ERROR(SyncDirectory(to));
  return SyncDirectory(from);
}

// Puts the finished database in the place of the old one; may be called again after any part of it.
absl::Status Install(const fs::path& directory, const fs::path& finished) {
  const fs::path old_files =
      directory /
      absl::StrCat(kOldFiles, finished.filename().string().substr(sizeof(kFinished) - 1));
  std::error_code error;
  if (!fs::exists(finished / kOldFilesMoved)) {
    fs::create_directory(old_files, error);
    MMFREE_RETURN_IF_ERROR(FromError(error, "cannot make", old_files));
    MMFREE_RETURN_IF_ERROR(MoveFiles(directory, old_files, ""));
    MMFREE_RETURN_IF_ERROR(WriteWholeFile(finished / kOldFilesMoved, ""));
    MMFREE_RETURN_IF_ERROR(SyncDirectory(finished));
  }
  MMFREE_RETURN_IF_ERROR(MoveFiles(finished, directory, kOldFilesMoved));
  fs::remove_all(finished, error);
  return FromError(error, "cannot remove", finished);
}

absl::Status Gather(const std::string& directory, const std::optional<RocksDbManifest>& manifest,
                    RocksDbGather* gather) {
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> tables, FindRocksDbFiles(directory, ".sst"));
  // Those of a list that is damaged are all there are.
  std::map<uint64_t, RocksDbGather::TableRange> ranges;
  if (manifest.has_value()) {
    for (const rocksdb::LiveFileMetaData& table : manifest->tables) {
      ranges[table.file_number] = {table.smallestkey, table.largestkey, table.largest_seqno};
    }
  }
  for (const fs::path& path : tables) {
    const auto range = ranges.find(RocksDbFileNumber(path));
    if (manifest.has_value() && range == ranges.end()) continue;
    MMFREE_ASSIGN_OR_RETURN(const std::string file, ReadWholeFile(path));
    if (range == ranges.end()) {
      gather->AddTable(file, std::nullopt);
    } else {
      gather->AddTable(file, range->second);
      ranges.erase(range);
    }
  }
  for (const auto& [number, range] : ranges) gather->AddMissingTable(range);
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> logs, FindRocksDbFiles(directory, ".log"));
  for (const fs::path& path : logs) {
    MMFREE_ASSIGN_OR_RETURN(const std::string file, ReadWholeFile(path));
    gather->AddLog(file);
  }
  if (!gather->lossy()) return absl::OkStatus();
  // A session whose record is lost has its name beside its states.
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> blobs, FindRocksDbFiles(directory, ".blob"));
  for (const fs::path& path : blobs) {
    MMFREE_ASSIGN_OR_RETURN(const std::string file, ReadWholeFile(path));
    VisitRocksDbBlobKeys(file, [gather](absl::string_view key) { gather->AddName(key); });
  }
  return absl::OkStatus();
}

// Of its kept turns those that are whole: one that is not is found missing when it is asked for.
// Says whether the present one is.
bool AppendCheckpoints(const RocksDbGather& gather, const SessionName& name,
                       absl::string_view encoded_record, rocksdb::WriteBatch* batch) {
  const absl::StatusOr<SessionRecord> record = DecodeRecord(encoded_record);
  bool present = false;
  for (const KeptTurn& kept : record.ok() ? record->kept : std::vector<KeptTurn>()) {
    const std::string key = rocksdb_layout::CheckpointKey(name, kept.revision);
    const std::optional<std::string> checkpoint = gather.ReadCheckpoint(key);
    present = checkpoint.has_value() && CheckpointIsWhole(*checkpoint);
    if (present) batch->Put(key, *checkpoint);
  }
  if (!present) batch->Put(rocksdb_layout::LostStateKey(name), "");
  return present;
}

// A session that may be in what cannot be read: RocksDB knows better where a table's filter says
// that it is not in there.
RocksDbGather::Found AskRocksDb(rocksdb::DB* damaged, const std::string& key) {
  std::string value;
  const rocksdb::Status status = damaged == nullptr
                                     ? rocksdb::Status::Corruption()
                                     : damaged->Get(rocksdb::ReadOptions(), key, &value);
  if (status.ok()) return {true, std::move(value)};
  return {!status.IsNotFound(), std::nullopt};
}

// `damaged`: the old database; null: its list of files cannot be trusted.
absl::Status WriteNew(const std::string& directory, RocksDbGather* gather, rocksdb::DB* damaged,
                      RocksDbRebuild* result) {
  rocksdb::DB* opened = nullptr;
  MMFREE_RETURN_IF_ERROR(FromRocksDb(
      rocksdb::DB::Open(rocksdb_layout::Options(), directory, &opened), "making a new database"));
  const std::unique_ptr<rocksdb::DB> db(opened);
  rocksdb::WriteOptions write;
  write.disableWAL = true;
  absl::Status status;
  gather->VisitSessions([&](const std::string& key, const RocksDbGather::Found& gathered) {
    const RocksDbGather::Found found =
        gathered.value.has_value() ? gathered : AskRocksDb(damaged, key);
    if (!found.there) return;
    SessionName name;
    uint64_t ignored_revision = 0;
    absl::Time ignored_time;
    absl::string_view record;
    if (!status.ok() || !rocksdb_layout::ParseRecordKey(key, &name)) return;
    rocksdb::WriteBatch batch;
    if (found.value.has_value() &&
        rocksdb_layout::DecodeValue(*found.value, &ignored_revision, &ignored_time, &record)) {
      batch.Put(key, *found.value);
      if (AppendCheckpoints(*gather, name, record, &batch)) {
        ++result->kept;
      } else {
        result->lost.push_back(std::move(name));
      }
    } else {
      batch.Put(key, rocksdb_layout::EncodeValue(NewRevision(), absl::InfiniteFuture(),
                                                 rocksdb_layout::kLost));
      result->lost.push_back(std::move(name));
    }
    status = FromRocksDb(db->Write(write, &batch), "writing a new database");
  });
  MMFREE_RETURN_IF_ERROR(status);
  MMFREE_RETURN_IF_ERROR(FromRocksDb(db->Flush(rocksdb::FlushOptions()), "writing a new database"));
  return FromRocksDb(db->Close(), "closing a new database");
}

}  // namespace

absl::Status CheckRocksDbRebuildRoom(const std::string& directory) {
  std::error_code error;
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    if (entry.is_regular_file(error)) bytes += entry.file_size(error);
  }
  const fs::space_info space = fs::space(directory, error);
  if (error || space.available >= bytes) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(directory, " is damaged and has to be written anew, which needs up to ", bytes,
                   " bytes of its disk; ", space.available, " are free"));
}

absl::StatusOr<RocksDbRebuild> RebuildRocksDb(const std::string& directory) {
  MMFREE_RETURN_IF_ERROR(CheckRocksDbRebuildRoom(directory));
  RocksDbBlobReader blobs(directory);
  RocksDbGather gather([&blobs](absl::string_view place) { return blobs.Read(place); });
  MMFREE_ASSIGN_OR_RETURN(const std::optional<RocksDbManifest> manifest,
                          ReadRocksDbManifest(directory));
  MMFREE_RETURN_IF_ERROR(Gather(directory, manifest, &gather));

  const fs::path unfinished = fs::path(directory) / kUnfinished;
  std::error_code error;
  fs::remove_all(unfinished, error);
  MMFREE_RETURN_IF_ERROR(FromError(error, "cannot remove", unfinished));
  RocksDbRebuild result;
  const std::unique_ptr<rocksdb::DB> damaged =
      manifest.has_value() ? OpenRocksDbReadOnly(directory) : nullptr;
  MMFREE_RETURN_IF_ERROR(WriteNew(unfinished, &gather, damaged.get(), &result));

  const std::string time = absl::FormatTime("%Y%m%dT%H%M%E6S", absl::Now(), absl::UTCTimeZone());
  const fs::path old_files = fs::path(directory) / absl::StrCat(kOldFiles, time);
  fs::create_directory(old_files, error);
  MMFREE_RETURN_IF_ERROR(FromError(error, "cannot make", old_files));
  std::string list;
  for (const SessionName& name : result.lost) {
    absl::StrAppend(&list, absl::CHexEscape(name.owner), "\t", name.id, "\tlost\n");
  }
  MMFREE_RETURN_IF_ERROR(WriteWholeFile(old_files / "sessions.txt", list));
  result.old_files = old_files.string();

  const fs::path finished = fs::path(directory) / absl::StrCat(kFinished, time);
  MMFREE_RETURN_IF_ERROR(SyncDirectory(unfinished));
  fs::rename(unfinished, finished, error);
  MMFREE_RETURN_IF_ERROR(FromError(error, "cannot rename", unfinished));
  MMFREE_RETURN_IF_ERROR(SyncDirectory(directory));
  MMFREE_RETURN_IF_ERROR(Install(directory, finished));
  return result;
}

absl::Status FinishRocksDbRebuild(const std::string& directory) {
  std::error_code error;
  fs::path finished;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (absl::StartsWith(it->path().filename().string(), kFinished)) finished = it->path();
  }
  // There may be no database yet.
  if (finished.empty()) return absl::OkStatus();
  return Install(directory, finished);
}

}  // namespace mmfree
