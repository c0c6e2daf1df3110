// The reference implementation's outputs for the demo checkpoint, and how close an implementation
// must come.
#ifndef MMFREE_TESTS_CONFORMANCE_GOLDEN_H_
#define MMFREE_TESTS_CONFORMANCE_GOLDEN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mmfree {

// One prompt. T tokens with BOS, V the vocabulary.
struct GoldenCase {
  std::string text;
  std::vector<int32_t> ids;        // [T]
  std::vector<float> logits_last;  // [V] after the last token
  std::vector<float> nll;          // [T - 1] of token i+1 given those before it
  std::vector<int32_t> argmax;     // [T]
  std::vector<int32_t> greedy;     // [64] continuation; empty in the last case
};

// Reads tests/golden/tales.safetensors (its fp32 outputs).
absl::StatusOr<std::vector<GoldenCase>> LoadGolden(const std::string& path);

// What is under test: a backend, or a server behind a client.
class GoldenSubject {
 public:
  struct Scored {
    std::vector<float> logprobs;     // [T - 1]
    std::vector<int32_t> argmax;     // [T]
    std::vector<float> last_logits;  // [V]
  };

  virtual ~GoldenSubject() = default;
  virtual absl::StatusOr<Scored> Score(absl::Span<const int32_t> ids) = 0;
  // `count` greedy tokens after `ids`, past EOS.
  virtual absl::StatusOr<std::vector<int32_t>> Greedy(absl::Span<const int32_t> ids, int count) = 0;
};

// Fails the current test where the subject leaves the bounds of server/model/NUMERICS.md
// ("Conformance"): over the cases, the median of the relative logit error (||out - ref|| / ||ref||)
// is at most 1e-5 and the largest at most 3e-2; argmax agrees on at least 98 % of all positions;
// the mean NLL of each case is within 0.012. Prints what was measured.
void ExpectScoresConform(const std::vector<GoldenCase>& cases, GoldenSubject& subject);

// Likewise for greedy continuations: the first token equals the reference's wherever its two best
// logits are more than 0.3 apart; the longest equal prefix is 25 of 64 tokens on average; at least
// 3 cases are equal in all.
void ExpectGreedyConforms(const std::vector<GoldenCase>& cases, GoldenSubject& subject);

}  // namespace mmfree

#endif  // MMFREE_TESTS_CONFORMANCE_GOLDEN_H_
