// The state of a session as a message: exported, stored, or kept by the caller between turns.
#ifndef MMFREE_SERVER_SESSIONS_CHECKPOINT_H_
#define MMFREE_SERVER_SESSIONS_CHECKPOINT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "mmfree/v1/session.pb.h"
#include "server/sessions/session.h"
#include "server/sessions/session_key.h"

namespace mmfree {

inline constexpr uint32_t kCheckpointFormatVersion = 1;

// Checksummed, and signed when there is a key. `dtype` is a value of StateDtype (unspecified: F32);
// the 16-bit ones round to nearest even.
v1::SessionCheckpoint EncodeCheckpoint(const SessionState& state, const std::string& model_digest,
                                       v1::StateDtype dtype, const SessionKey& key);

// The state, which fits `shape` and is finite. FAILED_PRECONDITION: another format version or
// model, or not signed with `key`; DATA_LOSS: the checksum or the content is wrong. Never trusts a
// byte before that was checked.
absl::StatusOr<SessionState> DecodeCheckpoint(const v1::SessionCheckpoint& checkpoint,
                                              const ModelShape& shape, const SessionKey& key);

// What SessionCheckpoint.checksum is of a body.
uint64_t CheckpointChecksum(const std::string& body);

// Whether these bytes are a message whose checksum is right.
bool CheckpointIsWhole(const std::string& bytes);

// The digest of the model that a checkpoint says it is of, for choosing one; DecodeCheckpoint
// checks the rest. FAILED_PRECONDITION: another format version; DATA_LOSS: damaged.
absl::StatusOr<std::string> CheckpointModelDigest(const v1::SessionCheckpoint& checkpoint);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_CHECKPOINT_H_
