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
        CreateCudaBackend(Model::Random(SmallConfig(), 1), options);
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
  const absl::Status status = CreateCudaBackend(Model::Random(config, 1), options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--max_sessions"));
}

TEST(CreateTest, MissingDevicesAndBadOptionsAreNamed) {
  MMFREE_SKIP_WITHOUT_GPU();
  const std::shared_ptr<const Model> model = Model::Random(SmallConfig(), 1);
  CudaBackendOptions options;
  options.device = 99;
  EXPECT_EQ(CreateCudaBackend(model, options).status().code(), absl::StatusCode::kNotFound);
  options.device = 0;
  options.num_slots = 0;
  EXPECT_EQ(CreateCudaBackend(model, options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mmfree
