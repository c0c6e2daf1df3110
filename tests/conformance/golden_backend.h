// A backend as the subject of the golden tests, driven without scheduler or server.
#ifndef MMFREE_TESTS_CONFORMANCE_GOLDEN_BACKEND_H_
#define MMFREE_TESTS_CONFORMANCE_GOLDEN_BACKEND_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/base/status_macros.h"
#include "tests/conformance/golden.h"

namespace mmfree {

// Uses slot 0 of a backend that takes 256 tokens in a step.
class GoldenBackend final : public GoldenSubject {
 public:
  explicit GoldenBackend(Backend* backend) : backend_(backend) {}

  absl::StatusOr<Scored> Score(absl::Span<const int32_t> ids) override {
    MMFREE_RETURN_IF_ERROR(backend_->ZeroSlot(0));
    std::vector<int32_t> targets(ids.begin() + 1, ids.end());
    targets.push_back(-1);
    StepRow row;
    row.tokens = ids;
    row.targets = targets;
    row.logits = LogitsMode::kLast;
    StepOutput out;
    MMFREE_RETURN_IF_ERROR(backend_->Step({row}, &out));
    Scored scored;
    scored.last_logits = out.logits;
    for (size_t i = 0; i < out.scores.size(); ++i) {
      scored.argmax.push_back(out.scores[i].argmax);
      if (i + 1 < out.scores.size()) scored.logprobs.push_back(out.scores[i].logprob);
    }
    return scored;
  }

  absl::StatusOr<std::vector<int32_t>> Greedy(absl::Span<const int32_t> ids, int count) override {
    MMFREE_RETURN_IF_ERROR(backend_->ZeroSlot(0));
    const SamplingParams greedy;
    std::vector<int32_t> emitted;
    std::vector<int32_t> fed(ids.begin(), ids.end());
    uint64_t position = 0;
    StepOutput out;
    while (static_cast<int>(emitted.size()) < count) {
      StepRow row;
      row.tokens = fed;
      row.position = position;
      row.sampling = &greedy;
      MMFREE_RETURN_IF_ERROR(backend_->Step({row}, &out));
      position += fed.size();
      emitted.push_back(out.samples[0].token);
      fed = {out.samples[0].token};
    }
    return emitted;
  }

 private:
  Backend* backend_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_CONFORMANCE_GOLDEN_BACKEND_H_
