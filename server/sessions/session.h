// What a session is, without how it is stored.
#ifndef MMFREE_SERVER_SESSIONS_SESSION_H_
#define MMFREE_SERVER_SESSIONS_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace mmfree {

// Names a session: ids are unique among the sessions of one owner, so nobody can tell which ids
// others use.
struct SessionName {
  std::string owner;  // the caller's identity; empty without authentication
  std::string id;     // 1 to 128 characters of [A-Za-z0-9._-]

  friend bool operator==(const SessionName& a, const SessionName& b) {
    return a.id == b.id && a.owner == b.owner;
  }
  template <typename H>
  friend H AbslHashValue(H h, const SessionName& name) {
    return H::combine(std::move(h), name.owner, name.id);
  }
};

// Fed tokens that a state remembers, for penalties that look back over a turn.
inline constexpr size_t kMaxLastTokens = 1024;

// Tokens of a context that may wait to be fed: far more than a stop string goes through.
inline constexpr size_t kMaxPendingTokens = 1 << 16;

class DevicePlace;  // device_pool.h

// A context between two turns.
struct SessionState {
  // [num_layers, hidden_size]; empty: nothing was fed, or the state is only on the device.
  std::vector<float> state;
  // The same state on a device, or null.
  std::shared_ptr<const DevicePlace> device;
  int64_t token_count = 0;           // tokens fed: the position of the next one
  std::vector<int32_t> pending;      // tokens of the context that are not fed yet; few
  std::vector<int32_t> last_tokens;  // the last ones fed, oldest first; at most kMaxLastTokens
  uint64_t turn = 0;                 // committed turns

  int64_t context_tokens() const { return token_count + static_cast<int64_t>(pending.size()); }
};

// What a state must fit.
struct ModelShape {
  std::string digest;        // lower-case hex SHA-256
  int64_t state_floats = 0;  // num_layers * hidden_size
  int64_t vocab_size = 0;
};

// Where the present state is quickest at hand.
enum class SessionTier : uint8_t { kDevice, kHost, kStore };

// A session as its owner may know it.
struct SessionInfo {
  SessionName name;
  std::string model;
  std::string model_digest;
  int64_t token_count = 0;   // of the context, pending ones included
  uint64_t turn = 0;         // committed turns
  uint64_t oldest_turn = 0;  // that can still be named
  bool busy = false;         // a turn is running on this server
  SessionTier tier = SessionTier::kStore;
  int64_t bytes = 0;  // of all kept states
  absl::Time create_time;
  absl::Time last_use_time;
  absl::Time expire_time = absl::InfiniteFuture();
  absl::Duration ttl = absl::InfiniteDuration();
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_SESSION_H_
