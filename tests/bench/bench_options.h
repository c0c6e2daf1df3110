// What every benchmark is asked to do.
#ifndef MMFREE_TESTS_BENCH_BENCH_OPTIONS_H_
#define MMFREE_TESTS_BENCH_BENCH_OPTIONS_H_

#include <cstdint>
#include <string>

namespace mmfree {

struct BenchOptions {
  std::string backend = "cpu";  // or "cuda"
  std::string shape = "370m";
  std::string cpu_isa = "auto";
  std::string model;                 // load_model, engine: a directory
  int32_t threads = 0;               // 0: one for each physical core
  int32_t batch = 1;                 // sequences
  int32_t tokens = 0;                // per sequence; 0: the benchmark's own default
  int32_t max_tokens = 128;          // engine: of output, per request
  int32_t requests = 0;              // engine: in all; 0: four times the batch
  int32_t step_token_budget = 1024;  // engine: tokens of one step
  double seconds = 5;                // of measuring
  bool pin_threads = false;
  bool json = false;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_BENCH_BENCH_OPTIONS_H_
