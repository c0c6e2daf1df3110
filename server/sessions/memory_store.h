// Sessions in this process' memory: they end with it.
#ifndef MMFREE_SERVER_SESSIONS_MEMORY_STORE_H_
#define MMFREE_SERVER_SESSIONS_MEMORY_STORE_H_

#include <cstdint>
#include <memory>

#include "server/base/clock.h"
#include "server/sessions/store.h"

namespace mmfree {

struct MemoryStoreOptions {
  // Bytes of records and checkpoints above which no session is made (RESOURCE_EXHAUSTED). Turns of
  // those that exist go on.
  int64_t max_bytes = int64_t{1} << 30;
  const Clock* clock = Clock::Real();
};

std::unique_ptr<SessionStore> MakeMemoryStore(const MemoryStoreOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_MEMORY_STORE_H_
