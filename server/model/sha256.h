// SHA-256 as lower-case hex.
#ifndef MMFREE_SERVER_MODEL_SHA256_H_
#define MMFREE_SERVER_MODEL_SHA256_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mmfree {

std::string Sha256Hex(absl::Span<const uint8_t> data);
std::string Sha256Hex(absl::string_view text);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_SHA256_H_
