// A session without its states: what the store replaces at every change.
#ifndef MMFREE_SERVER_SESSIONS_SESSION_RECORD_H_
#define MMFREE_SERVER_SESSIONS_SESSION_RECORD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/sessions/session.h"

namespace mmfree {

struct KeptTurn {
  uint64_t turn = 0;
  uint64_t revision = 0;    // key of its checkpoint
  int64_t token_count = 0;  // of the context at its end
  int64_t bytes = 0;        // of its checkpoint
};

struct SessionRecord {
  SessionName name;
  std::string model;
  std::string model_digest;
  std::vector<KeptTurn> kept;  // oldest first, at least one; the last one is the present
  absl::Time create_time;
  absl::Time last_use_time;
  absl::Duration ttl = absl::InfiniteDuration();

  absl::Time expire_time() const { return last_use_time + ttl; }
  const KeptTurn& present() const { return kept.back(); }
  // Null when it is not kept.
  const KeptTurn* Find(uint64_t turn) const;
  // Without `busy` and `tier`.
  SessionInfo Info() const;
};

// With a checksum in front.
std::string EncodeRecord(const SessionRecord& record);
// DATA_LOSS: damaged, or of an unknown version.
absl::StatusOr<SessionRecord> DecodeRecord(absl::string_view bytes);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_SESSION_RECORD_H_
