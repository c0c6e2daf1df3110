// A parallel loop for loading: independent tasks on short-lived threads.
#ifndef MMFREE_SERVER_MODEL_PARALLEL_H_
#define MMFREE_SERVER_MODEL_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace mmfree {

// Calls task(i) once for each i in [0, count), in rising order of start, from up to `threads`
// threads of which the caller is one, fewer when the system starts no more; 0 means one for each
// processor. `after_own` runs on the calling thread after each task it did itself. Returns when all
// are done. Tasks must not throw.
void ParallelFor(
    int64_t count, int threads, absl::FunctionRef<void(int64_t)> task,
    absl::FunctionRef<void()> after_own = [] {});

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_PARALLEL_H_
