// What the CUDA backend refuses, and that a refusal changes nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

using testing::HasSubstr;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.vocab_size = 64;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 1;
  return config;
}

class ArgumentsTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    CudaBackendOptions options;
    options.num_slots = 2;
    options.max_step_tokens = 4;
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        CreateCudaBackend(*Model::Random(SmallConfig(), 1), options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  void ExpectRefused(const StepRow& row, const std::string& why) {
    ExpectRefused(std::vector<StepRow>{row}, why);
  }
  void ExpectRefused(const std::vector<StepRow>& rows, const std::string& why) {
    std::vector<float> before(32);
    std::vector<float> after(32);
    ASSERT_TRUE(backend_->ReadSlot(0, absl::MakeSpan(before)).ok());
    const absl::Status status = backend_->Step(rows, &out_);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
    ASSERT_TRUE(backend_->ReadSlot(0, absl::MakeSpan(after)).ok());
    EXPECT_EQ(before, after);
  }

  std::unique_ptr<Backend> backend_;
  StepOutput out_;
};

TEST_F(ArgumentsTest, StepNamesTheRowAndTheReason) {
  const std::vector<int32_t> tokens = {1, 2};
  StepRow good;
  good.tokens = tokens;
  StepRow row = good;
  row.slot = 2;
  ExpectRefused(row, "row 0: slot 2 is outside [0, 2)");
  row.slot = -1;
  ExpectRefused(row, "slot -1");
  ExpectRefused({good, good}, "row 1: slot 0 is used by two rows");
  row = good;
  row.tokens = {};
  ExpectRefused(row, "no tokens");
  const std::vector<int32_t> high = {64};
  row.tokens = high;
  ExpectRefused(row, "token id 64 is outside [0, 64)");
  const std::vector<int32_t> many = {1, 2, 3, 4, 5};
  row.tokens = many;
  ExpectRefused(row, "5 tokens, at most 4");
  row = good;
  const std::vector<int32_t> one_target = {3};
  row.targets = one_target;
  ExpectRefused(row, "1 targets for 2 tokens");
  const std::vector<int32_t> bad_targets = {3, -2};
  row.targets = bad_targets;
  ExpectRefused(row, "target -2");
}

TEST_F(ArgumentsTest, SamplingParametersAreChecked) {
  const std::vector<int32_t> tokens = {1};
  SamplingParams params;
  StepRow row;
  row.tokens = tokens;
  row.sampling = &params;
  for (const float temperature :
       {-1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    params.temperature = temperature;
    ExpectRefused(row, "temperature");
  }
  params.temperature = 1.0f;
  const std::vector<int32_t> outside = {64};
  params.banned = outside;
  ExpectRefused(row, "banned token id 64");
  std::vector<int32_t> all(64);
  for (int32_t id = 0; id < 64; ++id) all[id] = id;
  params.banned = all;
  ExpectRefused(row, "every token is banned");
}

TEST_F(ArgumentsTest, InnerSamplesAreOneFewerThanTokensAndChecked) {
  const std::vector<int32_t> tokens = {1, 2, 3};
  std::vector<SamplingParams> inner(3);
  StepRow row;
  row.tokens = tokens;
  row.inner = inner;
  ExpectRefused(row, "3 inner samples for 3 tokens");
  row.inner = absl::MakeConstSpan(inner).first(2);
  inner[1].temperature = -1.0f;
  ExpectRefused(row, "temperature");
}

TEST_F(ArgumentsTest, OnlyARewindableRowOfTheLastStepIsTakenBack) {
  const auto refused = [this](int32_t slot, int32_t count, const std::string& why) {
    const absl::Status status = backend_->Rewind(slot, count);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  };
  refused(0, 1, "slot 0 had no rewindable row");
  const std::vector<int32_t> tokens = {1, 2};
  StepRow rows[2];
  rows[1].slot = 1;
  rows[0].tokens = rows[1].tokens = tokens;
  rows[0].rewindable = true;
  ASSERT_TRUE(backend_->Step(rows, &out_).ok());
  refused(1, 1, "slot 1 had no rewindable row");
  refused(0, 0, "rewind to 0 of a row's 2 tokens");
  refused(0, 3, "rewind to 3");
  EXPECT_TRUE(backend_->Rewind(0, 2).ok());
  ASSERT_TRUE(backend_->Step({&rows[1], 1}, &out_).ok());
  refused(0, 1, "slot 0 had no rewindable row");
}

TEST(KeptStatesTest, RowsThatWouldKeepTooManyAreRefused) {
  MMFREE_SKIP_WITHOUT_GPU();
  BackendPair::Options options;
  absl::StatusOr<BackendPair> pair = BackendPair::Create(Model::Random(SmallConfig(), 1), options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  const std::vector<int32_t> tokens(kMaxKeptStates + 2, 5);
  StepRow rows[2];
  rows[1].slot = 1;
  rows[0].rewindable = rows[1].rewindable = true;
  rows[0].tokens = absl::MakeConstSpan(tokens).first(kMaxKeptStates);
  rows[1].tokens = absl::MakeConstSpan(tokens).first(3);
  StepOutput out;
  for (Backend* backend : {&pair->cpu(), &pair->cuda()}) {
    const absl::Status status = backend->Step(rows, &out);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("129 states, at most 128"));
  }
  rows[1].tokens = absl::MakeConstSpan(tokens).first(2);
  pair->Step(rows, "all that can be kept");
  pair->Rewind(0, 1, "first");
  pair->Rewind(1, 1, "last");
  for (const int32_t slot : {0, 1}) pair->ExpectEqualState(slot, "all that can be kept");
}

TEST_F(ArgumentsTest, SlotCallsCheckTheSlotAndTheSize) {
  std::vector<float> state(32);
  EXPECT_EQ(backend_->ZeroSlot(2).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(backend_->CopySlot(0, -1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(backend_->ReadSlot(9, absl::MakeSpan(state)).code(),
            absl::StatusCode::kInvalidArgument);
  state.resize(31);
  EXPECT_EQ(backend_->WriteSlot(0, state).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ArgumentsTest, AnEmptyStepIsEmpty) {
  ASSERT_TRUE(backend_->Step({}, &out_).ok());
  EXPECT_TRUE(out_.samples.empty());
}

TEST(CreateTest, TooMuchMemorySaysWhatToLower) {
  MMFREE_SKIP_WITHOUT_GPU();
  ModelConfig config = SmallConfig();
  config.hidden_size = 8192;
  config.intermediate_size = 8192;
  config.num_layers = 4;
  CudaBackendOptions options;
  options.num_slots = 1 << 20;
  options.max_step_tokens = 1 << 17;
  const absl::Status status = CreateCudaBackend(*Model::Random(config, 1), options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--max_sessions"));
}

TEST(CreateTest, MissingDevicesAndBadOptionsAreNamed) {
  MMFREE_SKIP_WITHOUT_GPU();
  const std::shared_ptr<const Model> model = Model::Random(SmallConfig(), 1);
  CudaBackendOptions options;
  options.device = 99;
  EXPECT_EQ(CreateCudaBackend(*model, options).status().code(), absl::StatusCode::kNotFound);
  options.device = 0;
  options.num_slots = 0;
  EXPECT_EQ(CreateCudaBackend(*model, options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mmfree
