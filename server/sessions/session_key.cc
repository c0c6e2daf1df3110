#include "server/sessions/session_key.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <array>
#include <fstream>
#include <iterator>

#include "absl/base/internal/raw_logging.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace mmfree {

absl::StatusOr<SessionKey> SessionKey::FromFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) {
    return absl::InvalidArgumentError(absl::StrCat("session key ", path, ": cannot be read"));
  }
  while (!bytes.empty() && (bytes.back() == '\n' || bytes.back() == '\r')) bytes.pop_back();
  if (bytes.size() < kMinBytes) {
    return absl::InvalidArgumentError(absl::StrCat("session key ", path, ": has ", bytes.size(),
                                                   " bytes; it must have at least ", kMinBytes,
                                                   ", such as: openssl rand -hex 32 > ", path));
  }
  return SessionKey(std::move(bytes));
}

std::string SessionKey::Sign(uint32_t format_version, absl::string_view body) const {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  std::string message;
  message.reserve(sizeof(format_version) + body.size());
  for (int shift = 0; shift < 32; shift += 8) {
    message.push_back(static_cast<char>(format_version >> shift & 0xff));
  }
  message.append(body.data(), body.size());
  const unsigned char* const result = HMAC(
      EVP_sha256(), bytes_.data(), static_cast<int>(bytes_.size()),
      reinterpret_cast<const unsigned char*>(message.data()), message.size(), digest.data(), &size);
  ABSL_RAW_CHECK(result != nullptr && size == 32, "HMAC-SHA-256 failed");
  return std::string(reinterpret_cast<const char*>(digest.data()), size);
}

bool SessionKey::Verify(uint32_t format_version, absl::string_view body,
                        absl::string_view signature) const {
  const std::string expected = Sign(format_version, body);
  return signature.size() == expected.size() &&
         CRYPTO_memcmp(signature.data(), expected.data(), expected.size()) == 0;
}

}  // namespace mmfree
