// How sessions lie in a RocksDB database.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_LAYOUT_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_LAYOUT_H_

#include <rocksdb/options.h>
#include <rocksdb/slice.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/sessions/session.h"

namespace mmfree {

// Keys. N is the owner's length in four bytes, so that no owner's keys are a prefix of another's.
//   'r' N owner id                  -> revision (8 bytes), expiry in microseconds (8), record
//   'c' N owner id '\0' revision    -> checkpoint
//   'l' N owner id                  -> nothing: the session's present checkpoint is lost
//   'p'                             -> what the last probe wrote
// Integers are big-endian in keys and little-endian in values.
namespace rocksdb_layout {

inline constexpr char kRecords = 'r';
inline constexpr char kCheckpoints = 'c';
inline constexpr char kLostStates = 'l';
inline constexpr char kProbe[] = "p";
inline constexpr size_t kKeyHeader = 5;
inline constexpr size_t kValueHeader = 16;
inline constexpr int64_t kNever = 0;  // as an expiry
// In place of the record of a session that was lost.
inline constexpr char kLost[] = "lost";

// What the keys of an owner's sessions begin with.
std::string OwnerPrefix(char kind, const std::string& owner);
std::string RecordKey(const SessionName& name);
std::string LostStateKey(const SessionName& name);
std::string CheckpointPrefix(const SessionName& name);
std::string CheckpointKey(const SessionName& name, uint64_t revision);
// The name in a record's key; false when it is not one.
bool ParseRecordKey(const rocksdb::Slice& key, SessionName* name);
// The same for a checkpoint's key.
bool ParseCheckpointKey(const rocksdb::Slice& key, SessionName* name);
// Whether a key is one of the above, and whether one may start with this.
bool IsKey(const rocksdb::Slice& key);
inline bool MayStartKey(char first) {
  return first == kRecords || first == kCheckpoints || first == kLostStates || first == kProbe[0];
}

// A record's value, and what it says; `record` is in `value`. False: it is cut short.
std::string EncodeValue(uint64_t revision, absl::Time expire_time, absl::string_view record);
bool DecodeValue(absl::string_view value, uint64_t* revision, absl::Time* expire_time,
                 absl::string_view* record);

// Of the database: what is wrong with its log but for the end keeps it from being opened.
rocksdb::Options Options();

}  // namespace rocksdb_layout

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_LAYOUT_H_
