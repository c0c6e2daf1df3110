#include "server/sessions/redis_connection.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

enum class Outcome { kOk, kBroken, kNoAnswer };

// hiredis tells a timeout of a blocking connection only through errno.
Outcome FailureOf(const redisContext& context, int error) {
  const bool timed_out = context.err == REDIS_ERR_IO &&
                         (error == EAGAIN || error == EWOULDBLOCK || error == ETIMEDOUT);
  return timed_out ? Outcome::kNoAnswer : Outcome::kBroken;
}

Outcome Exchange(redisContext* context, absl::Span<const RedisCommand> commands,
                 std::vector<RedisReply>* replies) {
  replies->clear();
  for (const RedisCommand& command : commands) {
    std::vector<const char*> data;
    std::vector<size_t> sizes;
    for (const absl::string_view argument : command) {
      data.push_back(argument.data());
      sizes.push_back(argument.size());
    }
    if (redisAppendCommandArgv(context, static_cast<int>(data.size()), data.data(), sizes.data()) !=
        REDIS_OK) {
      return Outcome::kBroken;
    }
  }
  while (replies->size() < commands.size()) {
    void* reply = nullptr;
    errno = 0;
    if (redisGetReply(context, &reply) != REDIS_OK) return FailureOf(*context, errno);
    replies->emplace_back(static_cast<redisReply*>(reply));
  }
  return Outcome::kOk;
}

}  // namespace

absl::StatusOr<RedisReply> RedisConnections::Command(const RedisCommand& command) {
  MMFREE_ASSIGN_OR_RETURN(std::vector<RedisReply> replies, Commands({command}));
  return std::move(replies.front());
}

absl::StatusOr<std::vector<RedisReply>> RedisConnections::Commands(
    absl::Span<const RedisCommand> commands) {
  std::vector<RedisReply> replies;
  Outcome outcome = Outcome::kBroken;
  MMFREE_ASSIGN_OR_RETURN(Connection connection, TakeIdle());
  if (connection != nullptr) {
    outcome = Exchange(connection.get(), commands, &replies);
    // The server was restarted, perhaps: then the other idle ones are broken too.
    if (outcome == Outcome::kBroken) DropIdle();
  }
  if (outcome == Outcome::kBroken) {
    MMFREE_ASSIGN_OR_RETURN(connection, Connect());
    outcome = Exchange(connection.get(), commands, &replies);
  }
  if (outcome == Outcome::kNoAnswer) {
    return Failed(absl::StrCat("no answer within ", absl::FormatDuration(options_.timeout)));
  }
  if (outcome == Outcome::kBroken) {
    return Failed(absl::StrCat("the connection broke: ", connection->errstr));
  }
  Succeeded(std::move(connection));
  for (const RedisReply& reply : replies) {
    if (reply->type != REDIS_REPLY_ERROR) continue;
    return absl::UnavailableError(absl::StrCat("session store redis, ", Address(), ": ",
                                               absl::string_view(reply->str, reply->len)));
  }
  return replies;
}

std::string RedisConnections::Address() const {
  return absl::StrCat(options_.host, ":", options_.port);
}

absl::StatusOr<RedisConnections::Connection> RedisConnections::TakeIdle() {
  absl::MutexLock lock(&mutex_);
  if (absl::Now() < next_attempt_) return absl::UnavailableError(last_error_);
  if (idle_.empty()) return Connection();
  Connection connection = std::move(idle_.back());
  idle_.pop_back();
  return connection;
}

void RedisConnections::Succeeded(Connection connection) {
  absl::MutexLock lock(&mutex_);
  idle_.push_back(std::move(connection));
  back_off_ = absl::ZeroDuration();
  next_attempt_ = absl::InfinitePast();
}

absl::Status RedisConnections::Failed(absl::string_view what) {
  absl::MutexLock lock(&mutex_);
  back_off_ = std::min(std::max(2 * back_off_, options_.first_back_off), options_.max_back_off);
  next_attempt_ = absl::Now() + back_off_;
  last_error_ = absl::StrCat("session store redis, ", Address(), ": ", what);
  return absl::UnavailableError(last_error_);
}

void RedisConnections::DropIdle() {
  std::vector<Connection> dropped;
  absl::MutexLock lock(&mutex_);
  dropped.swap(idle_);
}

absl::StatusOr<RedisConnections::Connection> RedisConnections::Connect() {
  const timeval timeout = absl::ToTimeval(options_.timeout);
  Connection connection(redisConnectWithTimeout(options_.host.c_str(), options_.port, timeout));
  if (connection != nullptr && connection->err == 0 &&
      redisSetTimeout(connection.get(), timeout) == REDIS_OK) {
    return connection;
  }
  return Failed(
      absl::StrCat("cannot connect: ", connection == nullptr ? "no memory" : connection->errstr));
}

}  // namespace mmfree
