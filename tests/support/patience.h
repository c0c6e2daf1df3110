// How long a test waits for what must happen, and what it can say of a program's memory.
#ifndef MMFREE_TESTS_SUPPORT_PATIENCE_H_
#define MMFREE_TESTS_SUPPORT_PATIENCE_H_

#include "absl/base/config.h"
#include "absl/time/time.h"

namespace mmfree {

// Whether this build's programs run under a sanitizer: several times slower, in several times the
// memory, of which what was freed stays for a while. A bound on a process's memory says nothing
// then.
#if defined(ABSL_HAVE_ADDRESS_SANITIZER) || defined(ABSL_HAVE_THREAD_SANITIZER)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// The limit of a wait that only a hang reaches on a busy machine is `limit` for an ordinary build.
// ctest's own limits grow by the same factor (deploy/cmake/MmfreeTargets.cmake).
inline absl::Duration Patience(absl::Duration limit) { return (kSanitized ? 8 : 1) * limit; }

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_PATIENCE_H_
