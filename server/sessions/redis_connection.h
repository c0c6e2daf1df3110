// Connections to one Redis server, made again after they broke.
#ifndef MMFREE_SERVER_SESSIONS_REDIS_CONNECTION_H_
#define MMFREE_SERVER_SESSIONS_REDIS_CONNECTION_H_

#include <hiredis/hiredis.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/sessions/redis_store.h"

namespace mmfree {

struct FreeRedisReply {
  void operator()(redisReply* reply) const { freeReplyObject(reply); }
};
using RedisReply = std::unique_ptr<redisReply, FreeRedisReply>;

// Thread-safe: each call has a connection of its own, and idle ones are kept.
class RedisConnections {
 public:
  explicit RedisConnections(const RedisStoreOptions& options) : options_(options) {}

  // Sends a command that is harmless to send twice and waits for its reply; once more, over a new
  // connection, when the first one breaks. UNAVAILABLE: no connection, no reply, or an error reply.
  absl::StatusOr<RedisReply> Command(const std::vector<absl::string_view>& arguments);

 private:
  struct FreeContext {
    void operator()(redisContext* context) const { redisFree(context); }
  };
  using Connection = std::unique_ptr<redisContext, FreeContext>;

  // An idle connection, or null.
  Connection TakeIdle();
  absl::StatusOr<Connection> Connect();
  void GiveBack(Connection connection);
  void DropIdle();

  const RedisStoreOptions options_;
  absl::Mutex mutex_;
  std::vector<Connection> idle_ ABSL_GUARDED_BY(mutex_);
  absl::Time next_attempt_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Duration back_off_ ABSL_GUARDED_BY(mutex_) = absl::ZeroDuration();
  std::string last_error_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_REDIS_CONNECTION_H_
