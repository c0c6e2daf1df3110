// The key that signs session checkpoints.
#ifndef MMFREE_SERVER_SESSIONS_SESSION_KEY_H_
#define MMFREE_SERVER_SESSIONS_SESSION_KEY_H_

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// Immutable. Never printed.
class SessionKey {
 public:
  static constexpr size_t kMinBytes = 32;

  // No key: nothing is signed, and signatures are not looked at.
  SessionKey() = default;
  explicit SessionKey(std::string bytes) : bytes_(std::move(bytes)) {}
  // The bytes of a file, without newlines at its end. INVALID_ARGUMENT when it cannot be read or
  // has fewer than kMinBytes.
  static absl::StatusOr<SessionKey> FromFile(const std::string& path);

  bool empty() const { return bytes_.empty(); }

  // HMAC-SHA-256 of the format version (four bytes, little-endian) and the body: 32 bytes.
  std::string Sign(uint32_t format_version, absl::string_view body) const;
  // Whether `signature` is that; in a time that does not depend on where they differ.
  bool Verify(uint32_t format_version, absl::string_view body, absl::string_view signature) const;

 private:
  std::string bytes_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_SESSION_KEY_H_
