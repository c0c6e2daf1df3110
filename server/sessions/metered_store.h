// A store whose calls are counted and timed.
#ifndef MMFREE_SERVER_SESSIONS_METERED_STORE_H_
#define MMFREE_SERVER_SESSIONS_METERED_STORE_H_

#include <memory>

#include "server/metrics/session_metrics.h"
#include "server/sessions/store.h"

namespace mmfree {

// `metrics` outlives the store.
std::unique_ptr<SessionStore> MakeMeteredStore(std::unique_ptr<SessionStore> store,
                                               SessionMetrics* metrics);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_METERED_STORE_H_
