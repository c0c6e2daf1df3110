#include "server/sessions/rocksdb_gather.h"

#include <rocksdb/write_batch.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/time/time.h"
#include "server/sessions/rocksdb_layout.h"
#include "server/sessions/rocksdb_log.h"
#include "server/sessions/session_record.h"

namespace mmfree {
namespace {

using Type = RocksDbEntry::Type;

constexpr uint64_t kMaxSequence = std::numeric_limits<uint64_t>::max();
// In front of a write: the sequence of its first entry, and how many it has.
constexpr size_t kWriteHeader = 12;

// The entries of a write of the log. Deletions of ranges are of checkpoints alone, which no record
// names any more.
class EntryReader final : public rocksdb::WriteBatch::Handler {
 public:
  EntryReader(uint64_t sequence, const std::function<void(RocksDbEntry)>& visit)
      : sequence_(sequence), visit_(visit) {}

  rocksdb::Status PutCF(uint32_t, const rocksdb::Slice& key, const rocksdb::Slice& value) override {
    visit_({key.ToString(), sequence_++, Type::kValue, value.ToString()});
    return rocksdb::Status::OK();
  }
  rocksdb::Status DeleteCF(uint32_t, const rocksdb::Slice& key) override {
    visit_({key.ToString(), sequence_++, Type::kDeletion, ""});
    return rocksdb::Status::OK();
  }
  rocksdb::Status DeleteRangeCF(uint32_t, const rocksdb::Slice&, const rocksdb::Slice&) override {
    ++sequence_;
    return rocksdb::Status::OK();
  }

 private:
  uint64_t sequence_;
  const std::function<void(RocksDbEntry)>& visit_;
};

}  // namespace

void RocksDbGather::AddTable(absl::string_view file, const std::optional<TableRange>& range) {
  const size_t number = tables_++;
  last_sequences_.push_back(range.has_value() ? range->last_sequence : kMaxSequence);
  RocksDbTable table = ReadRocksDbTable(file);
  for (RocksDbTable::Damage& damage : table.damages) {
    // The index is damaged, but the last entry is there.
    if (range.has_value() && damage.before.empty() && damage.after == range->last_key) continue;
    AddDamage(number, range.value_or(TableRange{"", "", kMaxSequence}), std::move(damage));
  }
  for (RocksDbEntry& entry : table.entries) AddCertain(std::move(entry));
}

void RocksDbGather::AddDamage(size_t table, const TableRange& range, RocksDbTable::Damage damage) {
  std::string after = damage.after;
  bool lossy = !damage.whole;
  for (RocksDbEntry& entry : damage.entries) {
    if (entry.key[0] == rocksdb_layout::kCheckpoints) {
      checkpoints_.try_emplace(std::move(entry.key), Value{entry.type, std::move(entry.value)});
      continue;
    }
    if (entry.key[0] != rocksdb_layout::kRecords) continue;
    std::optional<std::string> key = AddDoubtful(table, std::move(entry));
    if (!damage.whole) continue;
    if (key.has_value()) {
      // Between two that are right.
      if (lossy) losses_.push_back({table, after, *key, range});
      after = *std::move(key);
    }
    lossy = !key.has_value();
  }
  if (lossy) losses_.push_back({table, std::move(after), std::move(damage.before), range});
}

void RocksDbGather::AddMissingTable(const TableRange& range) {
  losses_.push_back({tables_++, "", "", range});
  last_sequences_.push_back(range.last_sequence);
}

void RocksDbGather::AddLog(absl::string_view file) {
  for (const std::string& write : ReadRocksDbLog(file)) {
    if (write.size() < kWriteHeader) continue;
    uint64_t sequence = 0;
    memcpy(&sequence, write.data(), sizeof(sequence));
    const std::function<void(RocksDbEntry)> add = [this](RocksDbEntry entry) {
      AddCertain(std::move(entry));
    };
    EntryReader reader(sequence, add);
    // What it does not know is nothing of ours.
    static_cast<void>(rocksdb::WriteBatch(write).Iterate(&reader));
  }
}

void RocksDbGather::AddCertain(RocksDbEntry entry) {
  Value value = {entry.type, std::move(entry.value)};
  if (entry.key[0] == rocksdb_layout::kCheckpoints) {
    // Written once, and never deleted while a record names it.
    if (entry.type != Type::kDeletion) checkpoints_[std::move(entry.key)] = std::move(value);
  } else if (entry.key[0] == rocksdb_layout::kRecords) {
    Session& session = sessions_[std::move(entry.key)];
    if (session.sequence.has_value() && *session.sequence > entry.sequence) return;
    session.sequence = entry.sequence;
    session.last = std::move(value);
  }
}

std::optional<std::string> RocksDbGather::AddDoubtful(size_t table, RocksDbEntry entry) {
  const uint64_t sequence = entry.sequence;
  const std::optional<std::string> bytes = Read({entry.type, std::move(entry.value)});
  uint64_t revision = 0;
  absl::Time ignored;
  absl::string_view encoded;
  if (bytes.has_value() && rocksdb_layout::DecodeValue(*bytes, &revision, &ignored, &encoded)) {
    const absl::StatusOr<SessionRecord> record = DecodeRecord(encoded);
    // Its own checksum vouches for the name and the time, and any revision is as good.
    if (record.ok()) {
      std::string key = rocksdb_layout::RecordKey(record->name);
      sessions_[key].doubtful.push_back(
          {table, sequence, rocksdb_layout::EncodeValue(revision, record->expire_time(), encoded)});
      return key;
    }
  }
  sessions_[std::move(entry.key)].doubtful.push_back({table, sequence, std::nullopt});
  return std::nullopt;
}

void RocksDbGather::AddName(absl::string_view checkpoint_key) {
  SessionName name;
  if (!rocksdb_layout::ParseCheckpointKey({checkpoint_key.data(), checkpoint_key.size()}, &name) ||
      name.id.empty()) {
    return;
  }
  const std::string key = rocksdb_layout::RecordKey(name);
  if (MayBeLost(key, std::nullopt, std::nullopt)) sessions_.try_emplace(key);
}

std::optional<std::string> RocksDbGather::Read(const Value& value) const {
  switch (value.type) {
    case Type::kDeletion:
      return std::nullopt;
    case Type::kValue:
      return value.bytes;
    case Type::kBlob:
      return read_blob_(value.bytes);
  }
  return std::nullopt;
}

bool RocksDbGather::MayBeLost(const std::string& key, std::optional<uint64_t> sequence,
                              std::optional<size_t> table) const {
  return std::any_of(losses_.begin(), losses_.end(), [&](const Loss& loss) {
    return loss.table != table && key > loss.after && (loss.before.empty() || key < loss.before) &&
           key >= loss.range.first_key &&
           (loss.range.last_key.empty() || key <= loss.range.last_key) &&
           (!sequence.has_value() || loss.range.last_sequence > *sequence);
  });
}

RocksDbGather::Found RocksDbGather::Resolve(const std::string& key, const Session& session) const {
  std::vector<const Doubtful*> later;
  for (const Doubtful& doubtful : session.doubtful) {
    if (!session.sequence.has_value() || last_sequences_[doubtful.table] > *session.sequence) {
      later.push_back(&doubtful);
    }
  }
  if (later.empty() && !MayBeLost(key, session.sequence, std::nullopt)) {
    const bool there = session.sequence.has_value() && session.last.type != Type::kDeletion;
    return {there, Read(session.last)};
  }
  // Of two versions the later one is the damaged block's only if it says so, and can be.
  const auto is_last = [&](const Doubtful& doubtful) {
    return !session.sequence.has_value() || (doubtful.sequence > *session.sequence &&
                                             doubtful.sequence <= last_sequences_[doubtful.table]);
  };
  if (later.size() == 1 && is_last(*later[0]) &&
      !MayBeLost(key, session.sequence, later[0]->table)) {
    return {true, later[0]->value};
  }
  return {true, std::nullopt};
}

RocksDbGather::Found RocksDbGather::Find(const std::string& record_key) const {
  const auto found = sessions_.find(record_key);
  return Resolve(record_key, found == sessions_.end() ? Session() : found->second);
}

void RocksDbGather::VisitSessions(
    const std::function<void(const std::string&, const Found&)>& visit) {
  if (lossy()) {
    for (const auto& [key, value] : checkpoints_) AddName(key);
  }
  for (const auto& [key, session] : sessions_) {
    const Found found = Resolve(key, session);
    if (found.there) visit(key, found);
  }
}

std::optional<std::string> RocksDbGather::ReadCheckpoint(const std::string& key) const {
  const auto found = checkpoints_.find(key);
  return found == checkpoints_.end() ? std::nullopt : Read(found->second);
}

}  // namespace mmfree
