// decode and prefill: whole steps of a backend.
#ifndef MMFREE_TESTS_BENCH_STEP_BENCH_H_
#define MMFREE_TESTS_BENCH_STEP_BENCH_H_

#include "absl/status/status.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// Steps of one token for each of options.batch sequences, each sampled greedily and fed back.
absl::Status BenchDecode(const BenchOptions& options);

// Steps that feed options.tokens (default 128) tokens to each of options.batch empty sequences and
// sample once.
absl::Status BenchPrefill(const BenchOptions& options);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_STEP_BENCH_H_
