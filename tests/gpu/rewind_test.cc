// Rows that sample at each of their tokens and are taken back: every length and every place to go
// back to, forks of what was gone back to, and places that a TokenSampler draws.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "server/model/model.h"
#include "server/sampling/request_sampler.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

class RewindTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    config_.vocab_size = 513;
    config_.hidden_size = 264;
    config_.intermediate_size = 384;
    config_.num_layers = 2;
    absl::StatusOr<BackendPair> pair = BackendPair::Create(Model::Random(config_, 6), {});
    ASSERT_TRUE(pair.ok()) << pair.status();
    pair_ = std::make_unique<BackendPair>(*std::move(pair));
  }

  ModelConfig config_;
  std::unique_ptr<BackendPair> pair_;
};

TEST_F(RewindTest, ToEveryTokenOfRowsOfEveryLength) {
  RowMaker maker(config_, 8);
  for (const int32_t length : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 66, 129}) {
    for (int32_t kept = 1; kept <= length; kept += length > 17 ? 16 : 1) {
      const std::string what = std::to_string(kept) + " of " + std::to_string(length);
      maker.Clear();
      std::vector<StepRow> rows = {maker.MakeInner(4, length, false)};
      rows[0].rewindable = true;
      if (length % 2 == 1) rows.push_back(maker.Make(5, 1, LogitsMode::kLast, false));
      pair_->Step(rows, what);
      pair_->Rewind(4, kept, what);
      pair_->ExpectEqualState(4, what);
      ASSERT_FALSE(HasFailure());
    }
    // A fork goes on beside what it was taken from.
    for (Backend* backend : {&pair_->cpu(), &pair_->cuda()}) {
      ASSERT_TRUE(backend->CopySlot(4, 6).ok());
    }
    maker.Clear();
    pair_->Step({maker.Make(6, 1, LogitsMode::kLast, false), maker.MakeInner(4, 3, false)}, "fork");
    for (const int32_t slot : {4, 6}) pair_->ExpectEqualState(slot, "fork");
    ASSERT_FALSE(HasFailure());
  }
}

TEST_F(RewindTest, PlacesOfATokenSamplerAmongOthers) {
  RowMaker maker(config_, 9);
  RequestSampler::Options listing;
  listing.top_logprobs = 5;
  RequestSampler::Options options;
  options.filters.top_k = 40;
  options.penalties.repetition = 1.2f;
  options.top_logprobs = 2;
  const std::vector<int32_t> before = {3, 4, 5};
  // Lists alternatives in a chunk of a prompt; draws behind each token of a row on trial.
  RequestSampler lister(listing, config_.vocab_size, {});
  RequestSampler drawer(options, config_.vocab_size, before);
  for (const int32_t chunk : {1, 40, 150}) {
    const std::string what = "beside a chunk of " + std::to_string(chunk);
    maker.Clear();
    StepRow prompt = maker.MakeInner(0, chunk, true);
    std::vector<SamplingParams> at_prompt(prompt.tokens.size());
    for (SamplingParams& params : at_prompt) params.sampler = &lister;
    prompt.inner = absl::MakeConstSpan(at_prompt).first(at_prompt.size() - 1);
    prompt.sampling = &at_prompt.back();
    StepRow trial = maker.MakeInner(1, 6, false);
    std::vector<SamplingParams> at_trial(trial.inner.begin(), trial.inner.end());
    for (const size_t i : {0, 2, 3}) at_trial[i].sampler = &drawer;
    trial.inner = at_trial;
    trial.rewindable = true;
    const StepOutput out =
        pair_->Step({prompt, trial, maker.Make(2, 1, LogitsMode::kLast, true)}, what);
    ASSERT_FALSE(HasFailure());
    EXPECT_EQ(out.inner_samples.size(), at_prompt.size() - 1 + at_trial.size());
    EXPECT_NE(out.samples[0].top, nullptr);
    pair_->Rewind(1, 4, what);
    for (const int32_t slot : {0, 1, 2}) pair_->ExpectEqualState(slot, what);
  }
}

}  // namespace
}  // namespace mmfree
