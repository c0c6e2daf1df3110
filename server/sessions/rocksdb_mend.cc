#include "server/sessions/rocksdb_mend.h"

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/sessions/checkpoint.h"
#include "server/sessions/rocksdb_files.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_watch.h"
#include "server/sessions/session_record.h"

namespace mmfree {

RocksDbRawReader::RocksDbRawReader(rocksdb::DB* db, const std::string& directory,
                                   const std::optional<std::string>& key)
    : blobs_(directory), gather_([this](absl::string_view place) { return blobs_.Read(place); }) {
  std::vector<rocksdb::LiveFileMetaData> tables;
  db->GetLiveFilesMetaData(&tables);
  for (const rocksdb::LiveFileMetaData& table : tables) {
    if (key.has_value() && (*key < table.smallestkey || *key > table.largestkey)) continue;
    const RocksDbGather::TableRange range = {table.smallestkey, table.largestkey,
                                             table.largest_seqno};
    const absl::StatusOr<std::string> file = ReadWholeFile(table.db_path + table.name);
    if (file.ok()) {
      gather_.AddTable(*file, range);
    } else {
      gather_.AddMissingTable(range);
    }
  }
}

absl::StatusOr<std::optional<std::string>> RocksDbRawReader::ReadRecord(
    const std::string& key) const {
  RocksDbGather::Found found = gather_.Find(key);
  if (!found.there || found.value.has_value()) return std::move(found.value);
  return absl::DataLossError(
      "the session's stored record is damaged; when the server starts again it takes from the "
      "store what is not");
}

absl::StatusOr<MendedStates> MendRocksDbStates(
    rocksdb::DB* db, const SessionName& name,
    const std::function<std::optional<std::string>(const std::string& key)>& read,
    rocksdb::WriteBatch* batch) {
  MendedStates result;
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  std::string value;
  uint64_t ignored_revision = 0;
  absl::Time ignored_time;
  absl::string_view encoded;
  if (!db->Get(options, rocksdb_layout::RecordKey(name), &value).ok() ||
      !rocksdb_layout::DecodeValue(value, &ignored_revision, &ignored_time, &encoded)) {
    return result;
  }
  // One that is lost or damaged names no states.
  const absl::StatusOr<SessionRecord> record = DecodeRecord(encoded);
  if (!record.ok()) return result;
  for (const KeptTurn& kept : record->kept) {
    const std::string key = rocksdb_layout::CheckpointKey(name, kept.revision);
    rocksdb::PinnableSlice ignored;
    const rocksdb::Status status = db->Get(options, db->DefaultColumnFamily(), key, &ignored);
    result.present_lost = !status.ok();
    if (status.ok() || status.IsNotFound()) continue;
    if (!IsRocksDbDamage(status)) {
      return absl::UnavailableError(
          absl::StrCat("session store, reading a checkpoint: ", status.ToString()));
    }
    ++result.mended;
    // It has a checksum of its own.
    const std::optional<std::string> bytes = read(key);
    result.present_lost = !bytes.has_value() || !CheckpointIsWhole(*bytes);
    if (result.present_lost) {
      batch->Delete(key);
    } else {
      batch->Put(key, *bytes);
    }
  }
  if (result.present_lost) batch->Put(rocksdb_layout::LostStateKey(name), "");
  return result;
}

}  // namespace mmfree
