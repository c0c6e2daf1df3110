#include "server/sessions/redis_store.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/sessions/redis_connection.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

// A session is one hash: v the revision, e its expiry in microseconds (0: never), f the same again
// (it has no checksum, and a session is not to go for a wrong bit), r the record,
// c<revision> the checkpoints and d<revision> the rest of those that are in two parts. The ids of
// an owner's sessions are a set of their own, which may name some that are gone; those are taken
// out when they are listed.

// Starts every script that changes something. ARGV[1] is the moment, in microseconds of Redis' own
// clock, after which its caller does not wait for it any more: it must change nothing then.
constexpr absl::string_view kDeadline = R"lua(
local time = redis.call('TIME')
local late = tonumber(time[1]) * 1000000 + tonumber(time[2]) >= tonumber(ARGV[1])
)lua";

// ARGV: expected revision ("" to create), revision, now and expiry in microseconds, milliseconds
// until then, record, how many parts the checkpoint has (0: there is none), the two parts or "",
// revisions whose checkpoints go.
// A change that is there already is OK: it was sent twice.
constexpr absl::string_view kCommit = R"lua(
local key = KEYS[1]
local v = redis.call('HGET', key, 'v')
if v == ARGV[3] then return 'OK' end
if late then return 'LATE' end
if v then
  local e = redis.call('HGET', key, 'e')
  local f = redis.call('HGET', key, 'f')
  if f and e ~= f then return 'DAMAGED' end
  e = tonumber(e)
  if e > 0 and e <= tonumber(ARGV[4]) then redis.call('DEL', key); v = false end
end
if ARGV[2] == '' then
  if v then return 'EXISTS' end
else
  if not v then return 'GONE' end
  if v ~= ARGV[2] then return 'MOVED' end
end
redis.call('HSET', key, 'v', ARGV[3], 'e', ARGV[5], 'f', ARGV[5], 'r', ARGV[7])
if ARGV[8] ~= '0' then redis.call('HSET', key, 'c' .. ARGV[3], ARGV[9]) end
if ARGV[8] == '2' then redis.call('HSET', key, 'd' .. ARGV[3], ARGV[10]) end
for i = 11, #ARGV do redis.call('HDEL', key, 'c' .. ARGV[i], 'd' .. ARGV[i]) end
if ARGV[5] == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ARGV[6]) end
return 'OK'
)lua";

constexpr absl::string_view kDelete = R"lua(
if late then return 'LATE' end
redis.call('DEL', KEYS[1])
return 'OK'
)lua";

// ARGV: an id.
constexpr absl::string_view kRemoveFromSet = R"lua(
if late then return 'LATE' end
redis.call('SREM', KEYS[1], ARGV[2])
return 'OK'
)lua";

// ARGV: what to write. It goes by itself, should nobody probe any more.
constexpr absl::string_view kProbe = R"lua(
if late then return 'LATE' end
redis.call('SET', KEYS[1], ARGV[2], 'PX', 60000)
return redis.call('GET', KEYS[1]) == ARGV[2] and 'OK' or 'OTHER'
)lua";

// Sessions whose records are read in one round trip.
constexpr size_t kListBatch = 256;

constexpr int64_t kNever = 0;

// Redis' allocator (jemalloc) has four sizes between a power of two and the next, so that a state
// just above one takes up to a quarter more memory than it has bytes. Two values then take less:
// one that fills such a size, and the rest.
struct Parts {
  absl::string_view first;
  absl::string_view rest;  // may be empty
};

// What `bytes` take of the allocator.
size_t AllocatedBytes(size_t bytes) {
  size_t step = 16;
  while (8 * step < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

Parts Split(absl::string_view value) {
  // Beside a value: its lengths, a kind, a zero. Of another value: its name, its entry in the hash.
  const size_t header = value.size() < 65536 ? 6 : 10;
  constexpr size_t kEntryBytes = 96;
  const size_t whole = AllocatedBytes(value.size() + header);
  size_t step = 16;
  while (8 * step < whole) step *= 2;
  const size_t below = whole - step;
  if (below <= header || value.size() + header == whole) return {value, ""};
  const size_t first = std::min(value.size(), below - header);
  const size_t rest = value.size() - first;
  if (below + AllocatedBytes(rest + header) + kEntryBytes >= whole) return {value, ""};
  return {value.substr(0, first), value.substr(first)};
}

std::string Hex(uint64_t revision) { return absl::StrFormat("%016x", revision); }

std::string SessionKeyOf(const SessionName& name) {
  return absl::StrCat("mmfree:session:", name.owner.size(), ":", name.owner, ":", name.id);
}
std::string OwnerKey(const std::string& owner) { return absl::StrCat("mmfree:owner:", owner); }

absl::string_view Text(const redisReply& reply) { return {reply.str, reply.len}; }

class RedisStore final : public SessionStore {
 public:
  explicit RedisStore(const RedisStoreOptions& options)
      : options_(options),
        redis_(options),
        probe_key_(absl::StrCat("mmfree:probe:", Hex(NewRevision()))) {}

  absl::string_view name() const override { return "redis"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return std::nullopt; }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    const std::string key = SessionKeyOf(name);
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Command(ReadCommand(key)));
    return RecordOf(name, *reply);
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    const std::string key = SessionKeyOf(name);
    const std::string first = absl::StrCat("c", Hex(revision));
    const std::string rest = absl::StrCat("d", Hex(revision));
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Command({"HMGET", key, first, rest}));
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements != 2 ||
        reply->element[0]->type != REDIS_REPLY_STRING) {
      return NoSuchCheckpoint(name);
    }
    const bool is_split = reply->element[1]->type == REDIS_REPLY_STRING;
    return std::make_shared<const std::string>(
        absl::StrCat(Text(*reply->element[0]), is_split ? Text(*reply->element[1]) : ""));
  }

  absl::Status Commit(const StoreChange& change) override {
    const absl::Time now = options_.clock->Now();
    const bool expires = change.expire_time != absl::InfiniteFuture();
    const int64_t milliseconds =
        expires ? std::max<int64_t>(1, absl::ToInt64Milliseconds(change.expire_time - now)) : 0;
    const std::vector<std::string> fixed = {
        change.expected.has_value() ? Hex(*change.expected) : "", Hex(change.revision),
        absl::StrCat(absl::ToUnixMicros(now)),
        absl::StrCat(expires ? absl::ToUnixMicros(change.expire_time) : kNever),
        absl::StrCat(milliseconds)};
    std::vector<absl::string_view> arguments(fixed.begin(), fixed.end());
    arguments.push_back(change.record);
    if (change.checkpoint == nullptr) {
      arguments.insert(arguments.end(), {"0", "", ""});
    } else {
      const Parts parts = Split(*change.checkpoint);
      arguments.insert(arguments.end(), {parts.rest.empty() ? "1" : "2", parts.first, parts.rest});
    }
    std::vector<std::string> obsolete;
    for (const uint64_t revision : change.obsolete) obsolete.push_back(Hex(revision));
    arguments.insert(arguments.end(), obsolete.begin(), obsolete.end());

    // Before the session is there: a list leaves out what is not.
    if (!change.expected.has_value()) {
      MMFREE_RETURN_IF_ERROR(AddToOwner(change.name));
    }
    MMFREE_ASSIGN_OR_RETURN(const std::string answer,
                            Change(kCommit, SessionKeyOf(change.name), arguments));
    if (answer == "OK") {
      // Again: who found no session before may just have taken its id out. The session is there
      // whatever becomes of this.
      if (!change.expected.has_value()) AddToOwner(change.name).IgnoreError();
      return absl::OkStatus();
    }
    if (answer == "EXISTS") return SessionExists(change.name);
    if (answer == "GONE") return NoSuchSession(change.name);
    if (answer == "MOVED") return SessionMovedOn(change.name);
    if (answer == "DAMAGED") return DamagedExpiry();
    return absl::DataLossError("the session store gave an answer that makes no sense");
  }

  absl::Status Delete(const SessionName& name) override {
    // One that has expired on our clock is no session any more.
    absl::Status present = Read(name).status();
    if (!present.ok() && !absl::IsDataLoss(present)) return present;
    MMFREE_RETURN_IF_ERROR(Change(kDelete, SessionKeyOf(name), {}).status());
    return RemoveFromOwner(name);
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    MMFREE_ASSIGN_OR_RETURN(const RedisReply ids, redis_.Command({"SMEMBERS", OwnerKey(owner)}));
    for (size_t begin = 0; begin < ids->elements; begin += kListBatch) {
      std::vector<SessionName> names;
      for (size_t i = begin; i < std::min(begin + kListBatch, ids->elements); ++i) {
        names.push_back({owner, std::string(Text(*ids->element[i]))});
      }
      MMFREE_RETURN_IF_ERROR(ListSome(names, visit));
    }
    return absl::OkStatus();
  }

  // Redis does it by itself.
  absl::StatusOr<int64_t> RemoveExpired(int64_t) override { return 0; }

  absl::Status Probe(int64_t bytes) override {
    const std::string written(static_cast<size_t>(bytes), 'p');
    MMFREE_ASSIGN_OR_RETURN(const std::string answer, Change(kProbe, probe_key_, {written}));
    if (answer == "OK") return absl::OkStatus();
    return absl::DataLossError("session store redis: a probe was not read as it was written");
  }

 private:
  static RedisCommand ReadCommand(absl::string_view key) {
    return {"HMGET", key, "v", "e", "f", "r"};
  }

  static absl::Status DamagedExpiry() {
    return absl::DataLossError("the session's stored expiry is damaged");
  }

  // From the reply to a ReadCommand.
  absl::StatusOr<StoredRecord> RecordOf(const SessionName& name, const redisReply& reply) const {
    if (reply.type != REDIS_REPLY_ARRAY || reply.elements != 4) {
      return absl::DataLossError("the session's stored record has the wrong shape");
    }
    if (reply.element[0]->type == REDIS_REPLY_NIL) return NoSuchSession(name);
    StoredRecord stored;
    int64_t expire = 0;
    const bool has_copy = reply.element[2]->type != REDIS_REPLY_NIL;  // not in older sessions
    for (size_t i = 0; i < reply.elements; ++i) {
      if (i == 2 && !has_copy) continue;
      if (reply.element[i]->type != REDIS_REPLY_STRING) {
        return absl::DataLossError("the session's stored record is not whole");
      }
    }
    if (!absl::SimpleHexAtoi(Text(*reply.element[0]), &stored.revision) ||
        !absl::SimpleAtoi(Text(*reply.element[1]), &expire)) {
      return absl::DataLossError("the session's stored record is damaged");
    }
    if (has_copy && Text(*reply.element[1]) != Text(*reply.element[2])) return DamagedExpiry();
    if (expire != kNever) stored.expire_time = absl::FromUnixMicros(expire);
    if (stored.expire_time <= options_.clock->Now()) return NoSuchSession(name);
    stored.record = std::string(Text(*reply.element[3]));
    return stored;
  }

  // Runs a script that changes `key`, and returns its answer. Once this has failed the change
  // cannot happen any more, though it may have happened: the script does nothing when it comes too
  // late by Redis' clock, which is read here before the wait for the script begins.
  absl::StatusOr<std::string> Change(absl::string_view script, const std::string& key,
                                     absl::Span<const absl::string_view> arguments) {
    MMFREE_ASSIGN_OR_RETURN(const RedisReply time, redis_.Command({"TIME"}));
    int64_t seconds = 0;
    int64_t microseconds = 0;
    if (time->type != REDIS_REPLY_ARRAY || time->elements != 2 ||
        !absl::SimpleAtoi(Text(*time->element[0]), &seconds) ||
        !absl::SimpleAtoi(Text(*time->element[1]), &microseconds)) {
      return absl::DataLossError("the session store gave a time that makes no sense");
    }
    const std::string deadline = absl::StrCat(seconds * 1'000'000 + microseconds +
                                              absl::ToInt64Microseconds(0.9 * options_.timeout));
    const std::string timed_script = absl::StrCat(kDeadline, script);
    RedisCommand command = {"EVAL", timed_script, "1", key, deadline};
    command.insert(command.end(), arguments.begin(), arguments.end());
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Command(command));
    if (reply->type != REDIS_REPLY_STRING) {
      return absl::DataLossError("the session store gave an answer that makes no sense");
    }
    if (Text(*reply) == "LATE") {
      return absl::UnavailableError(
          "session store redis: a change reached it too late and was not made");
    }
    return std::string(Text(*reply));
  }

  absl::Status ListSome(absl::Span<const SessionName> names,
                        const std::function<void(const StoredRecord&)>& visit) {
    std::vector<std::string> keys;
    for (const SessionName& name : names) keys.push_back(SessionKeyOf(name));
    std::vector<RedisCommand> commands;
    for (const std::string& key : keys) commands.push_back(ReadCommand(key));
    MMFREE_ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, redis_.Commands(commands));
    for (size_t i = 0; i < names.size(); ++i) {
      const absl::StatusOr<StoredRecord> stored = RecordOf(names[i], *replies[i]);
      if (stored.ok()) {
        visit(*stored);
      } else if (absl::IsNotFound(stored.status())) {
        MMFREE_RETURN_IF_ERROR(RemoveFromOwner(names[i]));
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddToOwner(const SessionName& name) {
    return redis_.Command({"SADD", OwnerKey(name.owner), name.id}).status();
  }

  // Takes out the id of a session that is gone. One of that name may be made meanwhile, here or by
  // a replica: if it is there now its id is put back, and if it comes later its maker does so.
  absl::Status RemoveFromOwner(const SessionName& name) {
    MMFREE_RETURN_IF_ERROR(Change(kRemoveFromSet, OwnerKey(name.owner), {name.id}).status());
    return absl::IsNotFound(Read(name).status()) ? absl::OkStatus() : AddToOwner(name);
  }

  const RedisStoreOptions options_;
  RedisConnections redis_;
  const std::string probe_key_;  // of this server
};

}  // namespace

absl::StatusOr<RedisStoreOptions> ParseRedisAddress(absl::string_view address) {
  RedisStoreOptions options;
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &options.port) || options.port < 1 ||
      options.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("redis://", address, ": expected redis://HOST:PORT"));
  }
  options.host = std::string(address.substr(0, colon));
  return options;
}

std::unique_ptr<SessionStore> MakeRedisStore(const RedisStoreOptions& options) {
  return std::make_unique<RedisStore>(options);
}

}  // namespace mmfree
