// The CUDA backend against the reference implementation, with the demo checkpoint.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/conformance/golden.h"
#include "tests/conformance/golden_backend.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

class GoldenCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    absl::StatusOr<std::vector<GoldenCase>> cases =
        LoadGolden(TestDataDirectory() + "/tests/golden/tales.safetensors");
    ASSERT_TRUE(cases.ok()) << cases.status();
    cases_ = *std::move(cases);
    absl::StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(TestDataDirectory() + "/deploy/models/tales");
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    CudaBackendOptions options;
    options.num_slots = 1;
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend(*model_, options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  std::vector<GoldenCase> cases_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
};

TEST_F(GoldenCudaTest, ScoresStayWithinTheBoundsOfTheReference) {
  GoldenBackend subject(backend_.get());
  ExpectScoresConform(cases_, subject);
}

TEST_F(GoldenCudaTest, GreedyContinuationsFollowTheReference) {
  GoldenBackend subject(backend_.get());
  ExpectGreedyConforms(cases_, subject);
}

TEST_F(GoldenCudaTest, EveryGoldenPromptGivesTheBytesOfTheScalarBackend) {
  BackendPair::Options options;
  absl::StatusOr<BackendPair> pair = BackendPair::Create(model_, options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  for (const GoldenCase& golden : cases_) {
    const absl::Span<const int32_t> ids = golden.ids;
    const SamplingParams greedy;
    StepRow row;
    row.tokens = ids.subspan(0, 200);
    row.sampling = &greedy;
    row.logits = LogitsMode::kAll;
    for (Backend* backend : {&pair->cpu(), &pair->cuda()}) ASSERT_TRUE(backend->ZeroSlot(0).ok());
    pair->Step({row}, "case " + std::to_string(&golden - cases_.data()));
    pair->ExpectEqualState(0, "case " + std::to_string(&golden - cases_.data()));
  }
}

}  // namespace
}  // namespace mmfree
