#include "server/sessions/rocksdb_open.h"

#include <rocksdb/env.h>

#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_blob.h"
#include "server/sessions/rocksdb_files.h"
#include "server/sessions/rocksdb_mark.h"
#include "server/sessions/rocksdb_rebuild.h"
#include "server/sessions/rocksdb_watch.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

absl::Status Fail(const std::string& directory, absl::string_view message) {
  return absl::FailedPreconditionError(
      absl::StrCat("session store rocksdb:", directory, ": ", message));
}

absl::Status LogIsDamaged(const std::string& directory, absl::string_view message) {
  return absl::DataLossError(absl::StrCat(
      "session store rocksdb:", directory, ": ", message,
      ", and opening it could undo committed turns without a word. Restore it from a backup, or "
      "start once with --session_salvage, which copies the log, opens what is whole and lists the "
      "sessions that are known to have lost turns"));
}

// Calls `function` while no other process can have the database open.
template <typename Function>
auto WithLock(const std::string& directory, const Function& function) -> decltype(function()) {
  rocksdb::Env* const env = rocksdb::Env::Default();
  rocksdb::FileLock* lock = nullptr;
  const rocksdb::Status status = env->LockFile(absl::StrCat(directory, "/LOCK"), &lock);
  if (!status.ok()) return Fail(directory, status.ToString());
  const absl::Cleanup unlock = [&] { env->UnlockFile(lock); };
  return function();
}

// Of the blob files that the database knows. Says whether anything that they held is gone.
absl::StatusOr<bool> MendBlobFiles(const std::string& directory, const RocksDbManifest& manifest) {
  bool lost = false;
  for (const uint64_t number : manifest.blobs) {
    const std::string path =
        absl::StrCat(directory, "/", absl::Dec(number, absl::kZeroPad6), ".blob");
    std::error_code error;
    if (!fs::exists(path, error)) {
      lost = true;
      Log(LogLevel::kError, absl::StrCat("session store: ", path,
                                         " is gone; sessions with states in it get DATA_LOSS"));
      continue;
    }
    MMFREE_ASSIGN_OR_RETURN(const bool mended, MendRocksDbBlobFile(path));
    if (mended) {
      lost = true;
      Log(LogLevel::kError, absl::StrCat("session store: ", path,
                                         " was damaged at its beginning or its end; sessions with "
                                         "states in what is lost of it get DATA_LOSS"));
    }
  }
  return lost;
}

// What is wrong with the files of a database that is there, as far as they tell before it is
// opened; nullopt: nothing that keeps it from that.
absl::StatusOr<std::optional<std::string>> Check(const std::string& directory,
                                                 bool* states_are_lost) {
  MMFREE_RETURN_IF_ERROR(FinishRocksDbRebuild(directory));
  // Without its CURRENT it would pass for one that is yet to be made.
  bool is_new = true;
  for (const absl::string_view extension : {".sst", ".blob", ".log"}) {
    MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> files,
                            FindRocksDbFiles(directory, extension));
    is_new &= files.empty();
  }
  if (is_new && !fs::exists(fs::path(directory) / "CURRENT")) return std::nullopt;
  MMFREE_ASSIGN_OR_RETURN(const std::optional<RocksDbManifest> manifest,
                          ReadRocksDbManifest(directory));
  if (!manifest.has_value()) return "its list of files is damaged";
  const uint64_t acknowledged = ReadRocksDbMark(directory);
  if (manifest->sequence < acknowledged) {
    return LogIsDamaged(directory,
                        absl::StrCat("acknowledged changes are missing: its log (*.log) was cut "
                                     "off or removed, and has ",
                                     manifest->sequence, " of ", acknowledged));
  }
  MMFREE_ASSIGN_OR_RETURN(*states_are_lost, MendBlobFiles(directory, *manifest));
  return std::nullopt;
}

absl::StatusOr<std::unique_ptr<rocksdb::DB>> Open(const rocksdb::Options& options,
                                                  const std::string& directory,
                                                  std::optional<std::string>* damage) {
  rocksdb::DB* opened = nullptr;
  rocksdb::Status status = rocksdb::DB::Open(options, directory, &opened);
  std::unique_ptr<rocksdb::DB> db(opened);
  if (status.ok()) status = db->VerifyChecksum();
  if (status.ok()) return db;
  if (!IsRocksDbDamage(status)) return Fail(directory, status.ToString());
  *damage = status.ToString();
  return nullptr;
}

absl::Status Rebuild(const std::string& directory, absl::string_view damage) {
  MMFREE_ASSIGN_OR_RETURN(const bool logs_are_whole, RocksDbLogsAreWhole(directory));
  if (!logs_are_whole) {
    return LogIsDamaged(directory, absl::StrCat(damage, "; its log (*.log) is damaged"));
  }
  MMFREE_ASSIGN_OR_RETURN(const RocksDbRebuild rebuild, RebuildRocksDb(directory));
  Log(LogLevel::kError, absl::StrCat("session store: ", directory, " was damaged (", damage,
                                     ") and has been written anew: ", rebuild.kept,
                                     " sessions are whole, ", rebuild.lost.size(),
                                     " are lost and get DATA_LOSS; the old files, which can be "
                                     "removed, and the names of the lost, in sessions.txt: ",
                                     rebuild.old_files));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<OpenedRocksDb> OpenRocksDb(const rocksdb::Options& options,
                                          const std::string& directory,
                                          std::optional<std::string> damage) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return Fail(directory, error.message());
  OpenedRocksDb opened;
  MMFREE_ASSIGN_OR_RETURN(const std::optional<std::string> found, WithLock(directory, [&] {
                            return Check(directory, &opened.states_are_lost);
                          }));
  if (!damage.has_value()) damage = found;
  if (!damage.has_value()) {
    MMFREE_ASSIGN_OR_RETURN(opened.db, Open(options, directory, &damage));
  }
  if (!damage.has_value()) return opened;
  MMFREE_RETURN_IF_ERROR(WithLock(directory, [&] { return Rebuild(directory, *damage); }));
  damage.reset();
  opened.states_are_lost = false;
  MMFREE_ASSIGN_OR_RETURN(opened.db, Open(options, directory, &damage));
  if (!damage.has_value()) return opened;
  return absl::DataLossError(absl::StrCat("session store rocksdb:", directory, ": ", *damage));
}

}  // namespace mmfree
