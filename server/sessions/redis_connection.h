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
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/sessions/redis_store.h"

namespace mmfree {

struct FreeRedisReply {
  void operator()(redisReply* reply) const { freeReplyObject(reply); }
};
using RedisReply = std::unique_ptr<redisReply, FreeRedisReply>;

using RedisCommand = std::vector<absl::string_view>;

// Thread-safe: each call has a connection of its own, and idle ones are kept.
class RedisConnections {
 public:
  explicit RedisConnections(const RedisStoreOptions& options) : options_(options) {}

  // Sends a command that is harmless to send twice and waits for its reply; once more, over a new
  // connection, when the first one breaks. UNAVAILABLE: no connection, no reply in time, or an
  // error reply. After a failure of the first two kinds none is tried for the options' back-off.
  absl::StatusOr<RedisReply> Command(const RedisCommand& command);

  // The same for several commands at once, in one round trip: as many replies, in their order.
  absl::StatusOr<std::vector<RedisReply>> Commands(absl::Span<const RedisCommand> commands);

 private:
  struct FreeContext {
    void operator()(redisContext* context) const { redisFree(context); }
  };
  using Connection = std::unique_ptr<redisContext, FreeContext>;

  // An idle connection, or null. UNAVAILABLE while none may be tried.
  absl::StatusOr<Connection> TakeIdle();
  absl::StatusOr<Connection> Connect();
  void Succeeded(Connection connection);
  absl::Status Failed(absl::string_view what);
  void DropIdle();
  std::string Address() const;

  const RedisStoreOptions options_;
  absl::Mutex mutex_;
  std::vector<Connection> idle_ ABSL_GUARDED_BY(mutex_);
  absl::Time next_attempt_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Duration back_off_ ABSL_GUARDED_BY(mutex_) = absl::ZeroDuration();
  std::string last_error_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_REDIS_CONNECTION_H_
