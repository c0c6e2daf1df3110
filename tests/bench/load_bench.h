// load_model: how long a model directory takes to load.
#ifndef MMFREE_TESTS_BENCH_LOAD_BENCH_H_
#define MMFREE_TESTS_BENCH_LOAD_BENCH_H_

#include "absl/status/status.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// Loads options.model, several times within options.seconds, and reports the fastest.
absl::Status BenchLoad(const BenchOptions& options);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_LOAD_BENCH_H_
