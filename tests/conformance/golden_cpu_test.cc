// The CPU backend against the reference implementation, on every instruction set.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "server/backends/cpu/cpu_backend.h"
#include "server/base/cpu_features.h"
#include "server/model/model.h"
#include "tests/conformance/golden.h"
#include "tests/conformance/golden_backend.h"

namespace mmfree {
namespace {

const std::string kSource = MMFREE_SOURCE_DIR;

class GoldenCpuTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    const std::string isa(CpuIsaName(GetParam()));
    if (!CpuSupports(GetParam())) GTEST_SKIP() << "this processor has no " << isa;
    absl::StatusOr<std::vector<GoldenCase>> cases =
        LoadGolden(kSource + "/tests/golden/tales.safetensors");
    ASSERT_TRUE(cases.ok()) << cases.status();
    cases_ = *std::move(cases);
    absl::StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(kSource + "/deploy/models/tales");
    ASSERT_TRUE(model.ok()) << model.status();
    CpuBackendOptions options;
    options.isa = isa;
    options.num_slots = 1;
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCpuBackend(*model, options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  std::vector<GoldenCase> cases_;
  std::unique_ptr<Backend> backend_;
};

TEST_P(GoldenCpuTest, ScoresStayWithinTheBoundsOfTheReference) {
  GoldenBackend subject(backend_.get());
  ExpectScoresConform(cases_, subject);
}

TEST_P(GoldenCpuTest, GreedyContinuationsFollowTheReference) {
  GoldenBackend subject(backend_.get());
  ExpectGreedyConforms(cases_, subject);
}

INSTANTIATE_TEST_SUITE_P(Isa, GoldenCpuTest,
                         testing::Values(CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvxVnni,
                                         CpuIsa::kAvx512, CpuIsa::kAvx512Gfni),
                         [](const auto& info) { return std::string(CpuIsaName(info.param)); });

}  // namespace
}  // namespace mmfree
