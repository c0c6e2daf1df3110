// Weights copied to the threads' nodes: the same weights and results, in other memory.
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/backends/backend.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/backends/cpu/topology.h"
#include "server/backends/cpu/weights.h"
#include "server/model/model.h"

namespace mmfree {
namespace {

// Halves of gate that share a row group, and a last row group that is not full.
ModelConfig OddConfig() {
  ModelConfig config;
  config.vocab_size = 131;
  config.hidden_size = 90;
  config.intermediate_size = 151;
  config.num_layers = 2;
  return config;
}

TEST(WeightsTest, PlacedWeightsAreWholeCopies) {
  const std::shared_ptr<const Model> model = Model::Random(OddConfig(), 7);
  for (int threads : {1, 2, 3, 8, 20}) {
    cpu::ThreadPool pool(threads);
    const absl::StatusOr<cpu::Weights> weights = cpu::PlaceWeights(*model, &pool);
    ASSERT_TRUE(weights.ok()) << weights.status();
    const auto expect_copy = [threads](const TernaryMatrix& from, const TernaryMatrix& to) {
      EXPECT_NE(from.codes, to.codes);
      EXPECT_EQ(from.rows, to.rows);
      EXPECT_EQ(from.cols, to.cols);
      EXPECT_EQ(from.scale, to.scale);
      EXPECT_EQ(memcmp(from.codes, to.codes, static_cast<size_t>(from.bytes())), 0) << threads;
    };
    for (size_t n = 0; n < model->layers().size(); ++n) {
      const LayerWeights& from = model->layers()[n];
      const LayerWeights& to = weights->layers[n];
      expect_copy(from.i, to.i);
      expect_copy(from.f, to.f);
      expect_copy(from.g, to.g);
      expect_copy(from.o, to.o);
      expect_copy(from.gate, to.gate);
      expect_copy(from.down, to.down);
    }
    expect_copy(model->lm_head(), weights->lm_head);
  }
}

TEST(WeightsTest, TwoNodesGiveTheBytesOfOne) {
  const std::shared_ptr<const Model> model = Model::Random(OddConfig(), 7);
  const std::vector<int> allowed = cpu::AllowedProcessors();
  std::vector<std::vector<float>> results;
  for (int nodes : {1, 2}) {
    CpuBackendOptions options;
    options.threads = 3;
    options.num_slots = 1;
    // Two nodes, on a single processor the same one twice.
    options.numa_nodes.push_back({allowed.front()});
    if (nodes == 2) options.numa_nodes.push_back({allowed.back()});
    const std::unique_ptr<Backend> backend = std::move(CreateCpuBackend(model, options).value());
    EXPECT_EQ(backend->info().description.find("2 NUMA nodes") != std::string::npos, nodes == 2);
    const std::vector<int32_t> tokens = {5, 130, 0, 77, 5};
    StepRow row;
    row.tokens = tokens;
    row.logits = LogitsMode::kAll;
    StepOutput out;
    ASSERT_TRUE(backend->Step(absl::MakeConstSpan(&row, 1), &out).ok());
    results.push_back(out.logits);
  }
  ASSERT_EQ(results[0].size(), results[1].size());
  EXPECT_EQ(memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)), 0);
  EXPECT_EQ(cpu::AllowedProcessors(), allowed);
}

TEST(WeightsTest, WithoutNumaNothingIsCopied) {
  CpuBackendOptions options;
  options.numa = false;
  options.numa_nodes = {{0}, {0}};
  const std::unique_ptr<Backend> backend =
      std::move(CreateCpuBackend(Model::Random(OddConfig(), 7), options).value());
  EXPECT_THAT(backend->info().description, testing::Not(testing::HasSubstr("NUMA")));
}

}  // namespace
}  // namespace mmfree
