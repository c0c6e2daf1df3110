// kernels: each operation of a step of the CPU backend by itself.
#ifndef MMFREE_TESTS_BENCH_KERNEL_BENCH_H_
#define MMFREE_TESTS_BENCH_KERNEL_BENCH_H_

#include "absl/status/status.h"
#include "tests/bench/bench_options.h"

namespace mmfree {

// Runs each kernel over all layers, with options.batch tokens and the weights of every layer in
// turn, the rows or channels shared by the threads as in a step.
absl::Status BenchKernels(const BenchOptions& options);

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_KERNEL_BENCH_H_
