// What a load generator asks for: requests drawn from distributions, the same for the same seed.
#ifndef MMFREE_CLIENT_LOAD_WORKLOAD_H_
#define MMFREE_CLIENT_LOAD_WORKLOAD_H_

#include <cstdint>
#include <random>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "mmfree/v1/inference.pb.h"

namespace mmfree {

// Whole numbers, at least 1.
class Distribution {
 public:
  // "N" (always), "LOW-HIGH" (uniform) or "exp:MEAN" (exponential, at most 20 times its mean). Each
  // number in [1, 10^9]. INVALID_ARGUMENT says what was expected.
  static absl::StatusOr<Distribution> Parse(absl::string_view text);

  int64_t Draw(std::mt19937_64& random) const;

 private:
  enum class Kind { kUniform, kExponential };
  Kind kind_ = Kind::kUniform;
  int64_t low_ = 1;
  int64_t high_ = 1;
  double mean_ = 1;
};

struct WorkloadOptions {
  std::string model;
  Distribution prompt_tokens;
  Distribution max_tokens;
  int64_t shared_prefix = 0;  // tokens before those, the same in every prompt
  int64_t vocab_size = 0;     // of the model; prompts are random ids
  float temperature = 1;
  // Shares of the requests, in [0, 1].
  double high = 0;
  double low = 0;
  double cancel = 0;  // cancelled by the client after a random number of tokens
  double slow = 0;    // read slowly
  // Requests are turns of so many sessions, SessionId(0) and on, each in its turn in an order that
  // has nothing to do with their names; 0: of none.
  int64_t sessions = 0;
  uint64_t seed = 1;
};

struct PlannedRequest {
  v1::GenerateRequest request;
  int64_t cancel_after = 0;  // tokens; 0: never
  bool slow = false;
};

// The name of a session that mmfree-load makes.
std::string SessionId(int64_t index);

// The `index`-th request: a function of the options and the index alone. Thread-safe.
PlannedRequest PlanRequest(const WorkloadOptions& options, int64_t index);

}  // namespace mmfree

#endif  // MMFREE_CLIENT_LOAD_WORKLOAD_H_
