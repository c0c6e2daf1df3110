// Sessions in a Redis server, shared by replicas.
#ifndef MMFREE_SERVER_SESSIONS_REDIS_STORE_H_
#define MMFREE_SERVER_SESSIONS_REDIS_STORE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/sessions/store.h"

namespace mmfree {

struct RedisStoreOptions {
  std::string host;
  int32_t port = 6379;
  absl::Duration timeout = absl::Seconds(2);  // of connecting, and of one command
  // After a failed connection or a timeout nothing is tried for so long, doubling up to the second
  // one; calls in between fail at once.
  absl::Duration first_back_off = absl::Milliseconds(50);
  absl::Duration max_back_off = absl::Seconds(2);
  const Clock* clock = Clock::Real();
};

// HOST:PORT, what follows redis://. INVALID_ARGUMENT says what is wrong.
absl::StatusOr<RedisStoreOptions> ParseRedisAddress(absl::string_view address);

// Does not need the server yet: calls fail with UNAVAILABLE until it can be reached. A change is
// one Lua script on one key, so it is atomic and fits a cluster; when the connection breaks during
// it, it is sent again, which is harmless, as it names its revision. One that is not answered in
// time is UNAVAILABLE and, by Redis' clock, cannot be made any more. How durable a commit is, is
// Redis' configuration (appendfsync always: as durable as RocksDB's). Redis itself removes what
// expires. Redis 5 or later.
std::unique_ptr<SessionStore> MakeRedisStore(const RedisStoreOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_REDIS_STORE_H_
