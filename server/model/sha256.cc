#include "server/model/sha256.h"

#include <openssl/evp.h>
#include <openssl/sha.h>

#include "absl/base/internal/raw_logging.h"
#include "absl/strings/escaping.h"

namespace mmfree {

std::string Sha256Hex(absl::Span<const uint8_t> data) {
  unsigned char hash[SHA256_DIGEST_LENGTH];
  // Fails only without a SHA-256 provider, which is a broken installation.
  if (EVP_Digest(data.data(), data.size(), hash, nullptr, EVP_sha256(), nullptr) != 1) {
    ABSL_RAW_LOG(FATAL, "OpenSSL cannot compute SHA-256");
  }
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(hash), sizeof(hash)));
}

std::string Sha256Hex(absl::string_view text) {
  return Sha256Hex(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

}  // namespace mmfree
