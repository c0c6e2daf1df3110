#include "server/sessions/redis_connection.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

// Null when the connection broke.
RedisReply Send(redisContext* context, const std::vector<absl::string_view>& arguments) {
  std::vector<const char*> data;
  std::vector<size_t> sizes;
  for (const absl::string_view argument : arguments) {
    data.push_back(argument.data());
    sizes.push_back(argument.size());
  }
  return RedisReply(static_cast<redisReply*>(
      redisCommandArgv(context, static_cast<int>(data.size()), data.data(), sizes.data())));
}

}  // namespace

absl::StatusOr<RedisReply> RedisConnections::Command(
    const std::vector<absl::string_view>& arguments) {
  RedisReply reply;
  Connection connection = TakeIdle();
  if (connection != nullptr) {
    reply = Send(connection.get(), arguments);
    // The server was restarted, perhaps: then the other idle ones are broken too.
    if (reply == nullptr) DropIdle();
  }
  if (reply == nullptr) {
    MMFREE_ASSIGN_OR_RETURN(connection, Connect());
    reply = Send(connection.get(), arguments);
  }
  if (reply == nullptr) {
    return absl::UnavailableError(absl::StrCat("session store redis: ", connection->errstr));
  }
  GiveBack(std::move(connection));
  if (reply->type == REDIS_REPLY_ERROR) {
    return absl::UnavailableError(
        absl::StrCat("session store redis: ", absl::string_view(reply->str, reply->len)));
  }
  return reply;
}

RedisConnections::Connection RedisConnections::TakeIdle() {
  absl::MutexLock lock(&mutex_);
  if (idle_.empty()) return nullptr;
  Connection connection = std::move(idle_.back());
  idle_.pop_back();
  return connection;
}

void RedisConnections::GiveBack(Connection connection) {
  absl::MutexLock lock(&mutex_);
  idle_.push_back(std::move(connection));
}

void RedisConnections::DropIdle() {
  std::vector<Connection> dropped;
  absl::MutexLock lock(&mutex_);
  dropped.swap(idle_);
}

absl::StatusOr<RedisConnections::Connection> RedisConnections::Connect() {
  {
    absl::MutexLock lock(&mutex_);
    if (absl::Now() < next_attempt_) {
      return absl::UnavailableError(absl::StrCat("session store redis: ", last_error_));
    }
  }
  const timeval timeout = absl::ToTimeval(options_.timeout);
  Connection connection(redisConnectWithTimeout(options_.host.c_str(), options_.port, timeout));
  absl::MutexLock lock(&mutex_);
  if (connection != nullptr && connection->err == 0 &&
      redisSetTimeout(connection.get(), timeout) == REDIS_OK) {
    back_off_ = absl::ZeroDuration();
    next_attempt_ = absl::InfinitePast();
    return connection;
  }
  back_off_ = std::min(std::max(2 * back_off_, options_.first_back_off), options_.max_back_off);
  next_attempt_ = absl::Now() + back_off_;
  last_error_ = absl::StrCat("cannot connect to ", options_.host, ":", options_.port, ": ",
                             connection == nullptr ? "no memory" : connection->errstr);
  return absl::UnavailableError(absl::StrCat("session store redis: ", last_error_));
}

}  // namespace mmfree
