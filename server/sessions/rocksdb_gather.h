// What can be known of the sessions in the files of a damaged RocksDB database.
#ifndef MMFREE_SERVER_SESSIONS_ROCKSDB_GATHER_H_
#define MMFREE_SERVER_SESSIONS_ROCKSDB_GATHER_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/sessions/rocksdb_table.h"

namespace mmfree {

// Of each record it keeps the last change that is certain, what damaged blocks seem to have of it,
// and where later changes may have been lost. Not thread-safe.
class RocksDbGather {
 public:
  // What the database itself says of a table.
  struct TableRange {
    std::string first_key, last_key;  // inclusive
    uint64_t last_sequence = 0;
  };
  // Reads a value at its place in a blob file; nullopt: it is not there.
  using ReadBlob = std::function<std::optional<std::string>(absl::string_view place)>;

  explicit RocksDbGather(ReadBlob read_blob) : read_blob_(std::move(read_blob)) {}

  void AddTable(absl::string_view file, const std::optional<TableRange>& range);
  // A table that is gone.
  void AddMissingTable(const TableRange& range);
  void AddLog(absl::string_view file);
  // After the others: the name in a checkpoint's key is one that a session had.
  void AddName(absl::string_view checkpoint_key);

  // Whether anything of tables may be lost.
  bool lossy() const { return !losses_.empty(); }

  struct Found {
    bool there = false;                // or lost, which is all that is known of it
    std::optional<std::string> value;  // of its record; nullopt: lost
  };
  Found Find(const std::string& record_key) const;
  // Calls `visit` for each session that is there, with its record's key.
  void VisitSessions(const std::function<void(const std::string&, const Found&)>& visit);
  // nullopt: it is nowhere.
  std::optional<std::string> ReadCheckpoint(const std::string& key) const;

 private:
  struct Value {
    RocksDbEntry::Type type = RocksDbEntry::Type::kDeletion;
    std::string bytes;
  };
  // What a damaged block has of a record; no value: not even its own checksum is right.
  struct Doubtful {
    size_t table;
    uint64_t sequence;
    std::optional<std::string> value;
  };
  struct Session {
    std::optional<uint64_t> sequence;  // of `last`
    Value last;
    std::vector<Doubtful> doubtful;
  };
  // Changes of keys between these, without them, may be lost.
  struct Loss {
    size_t table;
    std::string after;
    std::string before;  // none: to the end
    TableRange range;
  };

  void AddCertain(RocksDbEntry entry);
  void AddDamage(size_t table, const TableRange& range, RocksDbTable::Damage damage);
  // The key of the record that an entry seems to be, if it is one as it was written.
  std::optional<std::string> AddDoubtful(size_t table, RocksDbEntry entry);
  std::optional<std::string> Read(const Value& value) const;
  Found Resolve(const std::string& key, const Session& session) const;
  // Whether something later than `sequence` of `key` may have been in what is lost, but for what is
  // lost of `table`.
  bool MayBeLost(const std::string& key, std::optional<uint64_t> sequence,
                 std::optional<size_t> table) const;

  const ReadBlob read_blob_;
  size_t tables_ = 0;
  std::vector<uint64_t> last_sequences_;  // of tables
  std::map<std::string, Session> sessions_;
  std::unordered_map<std::string, Value> checkpoints_;
  std::vector<Loss> losses_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_ROCKSDB_GATHER_H_
