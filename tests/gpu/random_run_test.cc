// 10,000 steps in which sequences come and go, move between slots and to the host and back.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

constexpr int32_t kSlots = 24;
constexpr int kSteps = 10000;

// What the step loop may do to a slot between steps.
void DisturbSlot(BackendPair& pair, RowMaker& maker, std::vector<float>& state) {
  const int32_t slot = maker.Uniform(0, kSlots - 1);
  const int32_t other = maker.Uniform(0, kSlots - 1);
  const int32_t action = maker.Uniform(0, 5);
  for (Backend* backend : {&pair.cpu(), &pair.cuda()}) {
    switch (action) {
      case 0:  // a new sequence
        ASSERT_TRUE(backend->ZeroSlot(slot).ok());
        break;
      case 1:  // a fork
        ASSERT_TRUE(backend->CopySlot(slot, other).ok());
        break;
      case 2:  // preempted and resumed elsewhere
        ASSERT_TRUE(backend->ReadSlot(slot, absl::MakeSpan(state)).ok());
        ASSERT_TRUE(backend->WriteSlot(other, state).ok());
        break;
      default:
        break;
    }
  }
}

TEST(RandomRunTest, TenThousandStepsKeepEveryState) {
  MMFREE_SKIP_WITHOUT_GPU();
  ModelConfig config;
  config.vocab_size = 256;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.num_layers = 2;
  BackendPair::Options options;
  options.num_slots = kSlots;
  options.max_step_tokens = 128;
  options.cpu_isa = "auto";
  absl::StatusOr<BackendPair> pair = BackendPair::Create(Model::Random(config, 7), options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  RowMaker maker(config, 4);
  std::vector<float> state(config.state_floats());
  for (int step = 0; step < kSteps; ++step) {
    DisturbSlot(*pair, maker, state);
    maker.Clear();
    std::vector<StepRow> rows;
    const bool decode_only = maker.Uniform(0, 2) > 0;
    const bool speculative = maker.Uniform(0, 2) == 0;
    int32_t budget = options.max_step_tokens;
    for (int32_t slot = 0; slot < kSlots && budget > 0; ++slot) {
      if (maker.Uniform(0, 2) == 0) continue;
      const int32_t count =
          decode_only || maker.Uniform(0, 4) > 0 ? 1 : maker.Uniform(1, std::min(budget, 40));
      const bool scored = maker.Uniform(0, 9) == 0;
      if (speculative && maker.Uniform(0, 1) == 0) {
        const int32_t on_trial = maker.Uniform(1, std::min(budget, 6));
        budget -= on_trial;
        rows.push_back(maker.MakeInner(slot, on_trial, scored));
        rows.back().rewindable = true;
        continue;
      }
      budget -= count;
      rows.push_back(maker.Make(slot, count, LogitsMode::kNone, scored));
    }
    const std::string what = "step " + std::to_string(step);
    pair->Step(rows, what);
    for (const StepRow& row : rows) {
      // Now and then a row stays as it is.
      if (!row.rewindable || maker.Uniform(0, 9) == 0) continue;
      pair->Rewind(row.slot, maker.Uniform(1, static_cast<int32_t>(row.tokens.size())), what);
    }
    if (step % 100 == 99) {
      for (int32_t slot = 0; slot < kSlots; ++slot) pair->ExpectEqualState(slot, what);
    }
    ASSERT_FALSE(HasFailure());
  }
}

}  // namespace
}  // namespace mmfree
