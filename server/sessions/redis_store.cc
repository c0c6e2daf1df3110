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

// A session is one hash: v the revision, e its expiry in microseconds (0: never), r the record,
// c<revision> the checkpoints. The ids of an owner's sessions are a set of their own, which may
// name some that are gone; those are taken out when they are listed.
//
// ARGV: expected revision ("" to create), revision, now and expiry in microseconds, milliseconds
// until then, record, "1" and the checkpoint or "0" and "", revisions whose checkpoints go.
// A change that is there already is OK: it was sent twice.
constexpr absl::string_view kCommit = R"lua(
local key = KEYS[1]
local v = redis.call('HGET', key, 'v')
if v == ARGV[2] then return 'OK' end
if v then
  local e = tonumber(redis.call('HGET', key, 'e'))
  if e > 0 and e <= tonumber(ARGV[3]) then redis.call('DEL', key); v = false end
end
if ARGV[1] == '' then
  if v then return 'EXISTS' end
else
  if not v then return 'GONE' end
  if v ~= ARGV[1] then return 'MOVED' end
end
redis.call('HSET', key, 'v', ARGV[2], 'e', ARGV[4], 'r', ARGV[6])
if ARGV[7] == '1' then redis.call('HSET', key, 'c' .. ARGV[2], ARGV[8]) end
for i = 9, #ARGV do redis.call('HDEL', key, 'c' .. ARGV[i]) end
if ARGV[4] == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ARGV[5]) end
return 'OK'
)lua";

constexpr int64_t kNever = 0;

std::string Hex(uint64_t revision) { return absl::StrFormat("%016x", revision); }

std::string SessionKeyOf(const SessionName& name) {
  return absl::StrCat("mmfree:session:", name.owner.size(), ":", name.owner, ":", name.id);
}
std::string OwnerKey(const std::string& owner) { return absl::StrCat("mmfree:owner:", owner); }

absl::string_view Text(const redisReply& reply) { return {reply.str, reply.len}; }

class RedisStore final : public SessionStore {
 public:
  explicit RedisStore(const RedisStoreOptions& options) : options_(options), redis_(options) {}

  absl::string_view name() const override { return "redis"; }
  bool in_memory() const override { return false; }
  std::optional<int64_t> count() const override { return std::nullopt; }

  absl::StatusOr<StoredRecord> Read(const SessionName& name) override {
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply,
                            redis_.Command({"HMGET", SessionKeyOf(name), "v", "e", "r"}));
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements != 3) {
      return absl::DataLossError("the session's stored record has the wrong shape");
    }
    if (reply->element[0]->type == REDIS_REPLY_NIL) return NoSuchSession(name);
    StoredRecord stored;
    int64_t expire = 0;
    for (size_t i = 0; i < reply->elements; ++i) {
      if (reply->element[i]->type != REDIS_REPLY_STRING) {
        return absl::DataLossError("the session's stored record is not whole");
      }
    }
    if (!absl::SimpleHexAtoi(Text(*reply->element[0]), &stored.revision) ||
        !absl::SimpleAtoi(Text(*reply->element[1]), &expire)) {
      return absl::DataLossError("the session's stored record is damaged");
    }
    if (expire != kNever) stored.expire_time = absl::FromUnixMicros(expire);
    if (stored.expire_time <= options_.clock->Now()) return NoSuchSession(name);
    stored.record = std::string(Text(*reply->element[2]));
    return stored;
  }

  absl::StatusOr<SharedBytes> ReadCheckpoint(const SessionName& name, uint64_t revision) override {
    MMFREE_ASSIGN_OR_RETURN(
        const RedisReply reply,
        redis_.Command({"HGET", SessionKeyOf(name), absl::StrCat("c", Hex(revision))}));
    if (reply->type != REDIS_REPLY_STRING) return NoSuchCheckpoint(name);
    return std::make_shared<const std::string>(Text(*reply));
  }

  absl::Status Commit(const StoreChange& change) override {
    const absl::Time now = options_.clock->Now();
    const bool expires = change.expire_time != absl::InfiniteFuture();
    const int64_t milliseconds =
        expires ? std::max<int64_t>(1, absl::ToInt64Milliseconds(change.expire_time - now)) : 0;
    std::vector<std::string> arguments = {
        change.expected.has_value() ? Hex(*change.expected) : "", Hex(change.revision),
        absl::StrCat(absl::ToUnixMicros(now)),
        absl::StrCat(expires ? absl::ToUnixMicros(change.expire_time) : kNever),
        absl::StrCat(milliseconds)};
    const std::string key = SessionKeyOf(change.name);
    std::vector<absl::string_view> command = {"EVAL", kCommit, "1", key};
    command.insert(command.end(), arguments.begin(), arguments.end());
    command.push_back(change.record);
    command.push_back(change.checkpoint == nullptr ? "0" : "1");
    command.push_back(change.checkpoint == nullptr ? "" : absl::string_view(*change.checkpoint));
    std::vector<std::string> obsolete;
    for (const uint64_t revision : change.obsolete) obsolete.push_back(Hex(revision));
    command.insert(command.end(), obsolete.begin(), obsolete.end());

    // Before the session is there: a list leaves out what is not.
    if (!change.expected.has_value()) {
      MMFREE_RETURN_IF_ERROR(AddToOwner(change.name));
    }
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Command(command));
    const absl::string_view answer =
        reply->type == REDIS_REPLY_STRING ? Text(*reply) : absl::string_view();
    if (answer == "OK") {
      // Again: who found no session before may just have taken its id out. The session is there
      // whatever becomes of this.
      if (!change.expected.has_value()) AddToOwner(change.name).IgnoreError();
      return absl::OkStatus();
    }
    if (answer == "EXISTS") return SessionExists(change.name);
    if (answer == "GONE") return NoSuchSession(change.name);
    if (answer == "MOVED") return SessionMovedOn(change.name);
    return absl::DataLossError("the session store gave an answer that makes no sense");
  }

  absl::Status Delete(const SessionName& name) override {
    // One that has expired on our clock is no session any more.
    const absl::Status present = Read(name).status();
    if (!present.ok() && !absl::IsDataLoss(present)) return present;
    MMFREE_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Command({"DEL", SessionKeyOf(name)}));
    MMFREE_RETURN_IF_ERROR(RemoveFromOwner(name));
    return reply->integer == 1 ? absl::OkStatus() : NoSuchSession(name);
  }

  absl::Status List(const std::string& owner,
                    const std::function<void(const StoredRecord&)>& visit) override {
    MMFREE_ASSIGN_OR_RETURN(const RedisReply ids, redis_.Command({"SMEMBERS", OwnerKey(owner)}));
    for (size_t i = 0; i < ids->elements; ++i) {
      const SessionName name = {owner, std::string(Text(*ids->element[i]))};
      const absl::StatusOr<StoredRecord> stored = Read(name);
      if (stored.ok()) {
        visit(*stored);
      } else if (absl::IsUnavailable(stored.status())) {
        return stored.status();
      } else if (absl::IsNotFound(stored.status())) {
        MMFREE_RETURN_IF_ERROR(RemoveFromOwner(name));
      }
    }
    return absl::OkStatus();
  }

  // Redis does it by itself.
  absl::StatusOr<int64_t> RemoveExpired(int64_t) override { return 0; }

 private:
  absl::Status AddToOwner(const SessionName& name) {
    return redis_.Command({"SADD", OwnerKey(name.owner), name.id}).status();
  }

  // Takes out the id of a session that is gone. One of that name may be made meanwhile, here or by
  // a replica: if it is there now its id is put back, and if it comes later its maker does so.
  absl::Status RemoveFromOwner(const SessionName& name) {
    MMFREE_RETURN_IF_ERROR(redis_.Command({"SREM", OwnerKey(name.owner), name.id}).status());
    return absl::IsNotFound(Read(name).status()) ? absl::OkStatus() : AddToOwner(name);
  }

  const RedisStoreOptions options_;
  RedisConnections redis_;
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
