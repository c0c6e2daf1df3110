// Instruments of the sessions and their store.
#ifndef MMFREE_SERVER_METRICS_SESSION_METRICS_H_
#define MMFREE_SERVER_METRICS_SESSION_METRICS_H_

#include <cstdint>
#include <memory>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prometheus {
class Registry;
}

namespace mmfree {

// Thread-safe.
class SessionMetrics {
 public:
  // Registers every family in `registry`, which must outlive the metrics.
  static std::unique_ptr<SessionMetrics> Create(prometheus::Registry* registry);
  virtual ~SessionMetrics() = default;

  // Sessions with a running turn.
  virtual void SetBusy(int64_t sessions) = 0;
  // Sessions in the store, where it can tell.
  virtual void SetStored(int64_t sessions) = 0;
  // Of these, sessions that the store knows to be lost.
  virtual void SetLost(int64_t sessions) = 0;
  virtual void CountExpired(int64_t sessions) = 0;
  // A turn's end: "committed", "not_committed" (it failed, was cancelled or refused before),
  // "conflict" (another change came first, a deletion among them), "store_unavailable".
  virtual void CountTurn(absl::string_view outcome) = 0;

  // Places of states, quickest first.
  enum class Tier : uint8_t { kDevice, kHost, kStore };

  // The host cache: what it holds, and whether a state that was needed was in it.
  virtual void SetHostCache(int64_t states, int64_t bytes) = 0;
  virtual void CountHostCache(bool hit) = 0;
  // States of sessions on devices: added (or, negative, taken away).
  virtual void AddDeviceStates(int64_t states, int64_t bytes) = 0;
  // A turn found its state there.
  virtual void CountResume(Tier tier) = 0;
  // States that left kDevice or kHost for others.
  virtual void CountEvictions(Tier tier, int64_t states) = 0;

  // A call of the store. `operation`: "read", "read_checkpoint", "commit", "delete", "list",
  // "remove_expired", "probe"; `outcome`: "ok", "refused" (an answer about a session: there is
  // none, it has moved on), "unavailable", "data_loss".
  virtual void ObserveStore(absl::string_view operation, absl::string_view outcome,
                            absl::Duration time) = 0;
  // Whether the store can be read and written, as far as calls and probes tell.
  virtual void SetStoreReachable(bool reachable) = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_SESSION_METRICS_H_
