// engine: requests to an engine in this process, without RPC.
#ifndef MMFREE_TESTS_BENCH_ENGINE_BENCH_H_
#define MMFREE_TESTS_BENCH_ENGINE_BENCH_H_

#include "absl/status/status.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// options.requests greedy requests to the model directory options.model, options.batch of them at
// any time, each with its own prompt of options.tokens (default 32) tokens and options.max_tokens
// tokens of output: what mmfree-load asks of a server. INVALID_ARGUMENT without a model.
absl::Status BenchEngine(const BenchOptions& options);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_ENGINE_BENCH_H_
