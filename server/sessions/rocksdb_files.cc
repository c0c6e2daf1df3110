#include "server/sessions/rocksdb_files.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_log.h"
#include "server/sessions/rocksdb_table.h"

namespace mmfree {

namespace fs = std::filesystem;

absl::StatusOr<std::string> ReadWholeFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) {
    return absl::FailedPreconditionError(absl::StrCat("cannot read ", path.string()));
  }
  return bytes;
}

absl::Status WriteWholeFile(const fs::path& path, absl::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (file.good()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("cannot write ", path.string()));
}

absl::StatusOr<std::vector<fs::path>> FindRocksDbFiles(const std::string& directory,
                                                       absl::string_view extension) {
  std::error_code error;
  std::vector<fs::path> files;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (it->is_regular_file() && absl::string_view(it->path().extension().c_str()) == extension) {
      files.push_back(it->path());
    }
  }
  if (error) {
    return absl::FailedPreconditionError(absl::StrCat(directory, ": ", error.message()));
  }
  std::sort(files.begin(), files.end(), [](const fs::path& a, const fs::path& b) {
    return RocksDbFileNumber(a) < RocksDbFileNumber(b);
  });
  return files;
}

uint64_t RocksDbFileNumber(const fs::path& path) {
  uint64_t number = 0;
  return absl::SimpleAtoi(path.stem().string(), &number) ? number : 0;
}

absl::StatusOr<bool> RocksDbLogsAreWhole(const std::string& directory) {
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> logs, FindRocksDbFiles(directory, ".log"));
  for (const fs::path& path : logs) {
    MMFREE_ASSIGN_OR_RETURN(const std::string log, ReadWholeFile(path));
    if (!absl::StartsWith(log, WriteRocksDbLog(ReadRocksDbLog(log)))) return false;
  }
  return true;
}

std::unique_ptr<rocksdb::DB> OpenRocksDbReadOnly(const std::string& directory) {
  rocksdb::Options options = rocksdb_layout::Options();
  options.create_if_missing = false;
  options.paranoid_checks = false;
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kPointInTimeRecovery;
  rocksdb::DB* opened = nullptr;
  if (!rocksdb::DB::OpenForReadOnly(options, directory, &opened).ok()) return nullptr;
  return std::unique_ptr<rocksdb::DB>(opened);
}

absl::StatusOr<std::optional<RocksDbManifest>> ReadRocksDbManifest(const std::string& directory) {
  const std::unique_ptr<rocksdb::DB> db = OpenRocksDbReadOnly(directory);
  if (db == nullptr) return std::nullopt;
  std::optional<RocksDbManifest> manifest(std::in_place);
  db->GetLiveFilesMetaData(&manifest->tables);
  manifest->sequence = db->GetLatestSequenceNumber();
  rocksdb::ColumnFamilyMetaData family;
  db->GetColumnFamilyMetaData(&family);
  for (const rocksdb::BlobMetaData& blob : family.blob_files) {
    manifest->blobs.push_back(blob.blob_file_number);
  }

  // A table that it does not know was being made when the process ended, and then the logs have
  // what is in it, or its mention was cut off.
  MMFREE_ASSIGN_OR_RETURN(const std::vector<fs::path> tables, FindRocksDbFiles(directory, ".sst"));
  for (const fs::path& path : tables) {
    const uint64_t number = RocksDbFileNumber(path);
    if (std::any_of(manifest->tables.begin(), manifest->tables.end(),
                    [&](const auto& table) { return table.file_number == number; })) {
      continue;
    }
    MMFREE_ASSIGN_OR_RETURN(const std::string bytes, ReadWholeFile(path));
    for (const RocksDbEntry& entry : ReadRocksDbTable(bytes).entries) {
      if (entry.sequence > manifest->sequence) return std::nullopt;
    }
  }
  return manifest;
}

}  // namespace mmfree
