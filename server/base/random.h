// Random bits from the system.
#ifndef MMFREE_SERVER_BASE_RANDOM_H_
#define MMFREE_SERVER_BASE_RANDOM_H_

#include <sys/random.h>

#include <cerrno>
#include <cstdint>

#include "absl/base/internal/raw_logging.h"

namespace mmfree {

// 64 bits from the kernel, fit for keys and ids. Thread-safe.
inline uint64_t SystemRandomBits() {
  uint64_t bits = 0;
  // Cannot fail once the kernel's pool is ready, and waits for that; a signal may interrupt it
  // then.
  while (getrandom(&bits, sizeof(bits), 0) != static_cast<ssize_t>(sizeof(bits))) {
    ABSL_RAW_CHECK(errno == EINTR, "getrandom failed");
  }
  return bits;
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_RANDOM_H_
