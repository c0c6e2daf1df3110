#include "server/sessions/store.h"

#include "server/base/random.h"

namespace mmfree {

uint64_t NewRevision() {
  for (;;) {
    if (const uint64_t revision = SystemRandomBits(); revision != 0) return revision;
  }
}

}  // namespace mmfree
