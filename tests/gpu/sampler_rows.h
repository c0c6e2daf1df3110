// Samplers for the rows of a benchmark: one option of a request at a time.
#ifndef MMFREE_TESTS_GPU_SAMPLER_ROWS_H_
#define MMFREE_TESTS_GPU_SAMPLER_ROWS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/sampling/request_sampler.h"

namespace mmfree {

class SamplerRows {
 public:
  // `option`: none or temperature (no sampler), mask (a regular expression), allowed, bias,
  // penalties, top_k, top_p, typical_p, min_p, filters (all four), logprobs (5 alternatives) or
  // all. "-host" behind it: made on the host. Null for another text.
  static std::unique_ptr<SamplerRows> Create(const std::string& option, int64_t vocab,
                                             int32_t rows);

  // Null where SamplingParams say all.
  TokenSampler* sampler(int32_t row) const { return samplers_[row]; }
  // The row's token was sampled.
  void Append(int32_t row, int32_t token);

 private:
  class OnHost;

  std::vector<std::unique_ptr<RequestSampler>> requests_;
  std::vector<std::unique_ptr<TokenSampler>> wrappers_;
  std::vector<TokenSampler*> samplers_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_GPU_SAMPLER_ROWS_H_
