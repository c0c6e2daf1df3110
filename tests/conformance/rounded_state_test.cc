// What a state that was exported in 16 bits costs: the golden prompts, cut at every quarter, go on
// from the rounded state and from the exact one. Prints what was measured.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cpu/cpu_backend.h"
#include "server/model/model.h"
#include "server/sessions/checkpoint.h"
#include "server/sessions/session.h"
#include "server/sessions/session_key.h"
#include "tests/conformance/golden.h"

namespace mmfree {
namespace {

const std::string kSource = MMFREE_SOURCE_DIR;

struct Continuation {
  std::vector<float> logits;    // [tokens, vocab_size]
  std::vector<float> logprobs;  // [tokens - 1]
  std::vector<int32_t> argmax;  // [tokens]
};

class RoundedStateTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::vector<GoldenCase>> cases =
        LoadGolden(kSource + "/tests/golden/tales.safetensors");
    ASSERT_TRUE(cases.ok()) << cases.status();
    cases_ = *std::move(cases);
    absl::StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(kSource + "/deploy/models/tales");
    ASSERT_TRUE(model.ok()) << model.status();
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCpuBackend(*model, {.num_slots = 1});
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
    shape_ = {.digest = (*model)->digest(),
              .state_floats = backend_->info().state_floats,
              .vocab_size = (*model)->config().vocab_size};
  }

  std::vector<float> StateAfter(absl::Span<const int32_t> tokens) {
    StepRow row;
    row.tokens = tokens;
    StepOutput out;
    std::vector<float> state(static_cast<size_t>(shape_.state_floats));
    EXPECT_TRUE(backend_->ZeroSlot(0).ok());
    EXPECT_TRUE(backend_->Step({row}, &out).ok());
    EXPECT_TRUE(backend_->ReadSlot(0, absl::MakeSpan(state)).ok());
    return state;
  }

  // As exported and imported.
  std::vector<float> Rounded(const std::vector<float>& values, int64_t tokens,
                             v1::StateDtype dtype) const {
    SessionState state;
    state.state = values;
    state.token_count = tokens;
    const absl::StatusOr<SessionState> imported = DecodeCheckpoint(
        EncodeCheckpoint(state, shape_.digest, dtype, SessionKey()), shape_, SessionKey());
    EXPECT_TRUE(imported.ok()) << imported.status();
    return imported->state;
  }

  Continuation GoOn(const std::vector<float>& state, absl::Span<const int32_t> tokens) {
    std::vector<int32_t> targets(tokens.begin() + 1, tokens.end());
    targets.push_back(-1);
    StepRow row;
    row.tokens = tokens;
    row.targets = targets;
    row.logits = LogitsMode::kAll;
    StepOutput out;
    EXPECT_TRUE(backend_->WriteSlot(0, state).ok());
    EXPECT_TRUE(backend_->Step({row}, &out).ok());
    Continuation continuation;
    continuation.logits = out.logits;
    for (const TokenScore& score : out.scores) {
      continuation.logprobs.push_back(score.logprob);
      continuation.argmax.push_back(score.argmax);
    }
    continuation.logprobs.pop_back();
    return continuation;
  }

  struct Effect {
    double median_error = 0;  // over all positions, of ||rounded - exact|| / ||exact||
    double max_error = 0;
    double nll_change = 0;      // of the mean over all tokens
    double max_nll_change = 0;  // of the mean of one continuation
    double argmax_share = 0;    // of the positions where it is the same
  };

  Effect Measure(v1::StateDtype dtype) {
    std::vector<double> errors;
    double change = 0, worst = 0;
    size_t tokens = 0, same = 0;
    for (const GoldenCase& golden : cases_) {
      const absl::Span<const int32_t> ids = golden.ids;
      for (size_t quarter = 1; quarter < 4; ++quarter) {
        const size_t cut = ids.size() * quarter / 4;
        if (cut == 0 || ids.size() - cut < 2) continue;
        const std::vector<float> state = StateAfter(ids.first(cut));
        const Continuation exact = GoOn(state, ids.subspan(cut));
        const Continuation rounded =
            GoOn(Rounded(state, static_cast<int64_t>(cut), dtype), ids.subspan(cut));
        const size_t vocab = static_cast<size_t>(shape_.vocab_size);
        for (size_t place = 0; place < exact.argmax.size(); ++place) {
          double difference = 0, norm = 0;
          for (size_t i = place * vocab; i < (place + 1) * vocab; ++i) {
            const double d = static_cast<double>(rounded.logits[i]) - exact.logits[i];
            difference += d * d;
            norm += static_cast<double>(exact.logits[i]) * exact.logits[i];
          }
          errors.push_back(std::sqrt(difference / norm));
          same += rounded.argmax[place] == exact.argmax[place] ? 1 : 0;
        }
        double sum = 0;
        for (size_t i = 0; i < exact.logprobs.size(); ++i) {
          sum += static_cast<double>(exact.logprobs[i]) - rounded.logprobs[i];
        }
        change += sum;
        tokens += exact.logprobs.size();
        worst = std::max(worst, std::abs(sum) / static_cast<double>(exact.logprobs.size()));
      }
    }
    std::sort(errors.begin(), errors.end());
    return {errors[errors.size() / 2], errors.back(), change / static_cast<double>(tokens), worst,
            static_cast<double>(same) / static_cast<double>(errors.size())};
  }

  static void Print(const char* name, const Effect& effect) {
    printf(
        "%s: relative logit error median %.2e, max %.2e; NLL %+.2e per token, at most %.2e in "
        "one continuation; argmax the same at %.2f %%\n",
        name, effect.median_error, effect.max_error, effect.nll_change, effect.max_nll_change,
        100 * effect.argmax_share);
  }

  std::vector<GoldenCase> cases_;
  std::unique_ptr<Backend> backend_;
  ModelShape shape_;
};

TEST_F(RoundedStateTest, NothingIsLostInThirtyTwoBits) {
  const Effect effect = Measure(v1::STATE_DTYPE_F32);
  EXPECT_EQ(effect.max_error, 0);
  EXPECT_EQ(effect.argmax_share, 1);
}

// Any change of a state, however small, makes some activation round to another of its 256 values,
// and that is most of what shows: both formats cost the same.
TEST_F(RoundedStateTest, SixteenBitsChangeLittle) {
  for (const auto& [name, dtype] :
       {std::pair("f16", v1::STATE_DTYPE_F16), std::pair("bf16", v1::STATE_DTYPE_BF16)}) {
    const Effect effect = Measure(dtype);
    Print(name, effect);
    EXPECT_GT(effect.median_error, 0) << name;
    EXPECT_LT(effect.median_error, 0.03) << name;
    EXPECT_LT(effect.max_error, 0.1) << name;
    EXPECT_LT(std::abs(effect.nll_change), 0.01) << name;
    EXPECT_LT(effect.max_nll_change, 0.1) << name;
    EXPECT_GT(effect.argmax_share, 0.96) << name;
  }
}

}  // namespace
}  // namespace mmfree
