// Whole engines over the demo model: requests with constraints, filters, penalties and alternatives
// give the same tokens and logprobs on the CPU and on the GPU, many at once, and JSON that parses.
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cpu/cpu_backend.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/engine/engine.h"
#include "server/tokenizer/tokenizer.h"
#include "tests/gpu/backend_pair.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/random_draws.h"

namespace mmfree {
namespace {

constexpr int kRequests = 48;

constexpr char kSchema[] =
    R"({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3}},
        "required": ["name", "age", "tags"], "additionalProperties": false})";

class ConstrainedEngineTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    const std::string directory = TestDataDirectory() + "/deploy/models/tales";
    absl::StatusOr<std::shared_ptr<const Model>> model = Model::Load(directory);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    auto tokenizer = Tokenizer::Load(directory, model_->config().vocab_size);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }

  static bool IsJson(int i) { return i % 2 == 0; }

  GenerationRequest Request(const Engine& engine, int i) const {
    GenerationRequest request;
    request.prompt = *tokenizer_->Encode("Once upon a time number " + std::to_string(i), {});
    request.max_new_tokens = 160;
    request.sampling.temperature = i % 5 == 4 ? 0.0f : 0.5f + 0.1f * static_cast<float>(i % 7);
    request.sampling.seed = static_cast<uint64_t>(i);
    request.eos_token_ids = {tokenizer_->eos_id()};
    if (i % 3 == 0) request.min_new_tokens = 20;
    RequestSampler::Options options;
    if (IsJson(i)) {
      options.constraint =
          *engine.constraints()->Compile(ConstraintCache::Kind::kJsonSchema, kSchema);
      options.end_tokens = request.eos_token_ids;
    }
    if (i % 3 == 1) options.filters.top_p = 0.9f;
    if (i % 5 == 1) options.filters.top_k = 20;
    if (i % 7 == 1) options.filters.typical_p = 0.8f;
    if (i % 4 == 3) options.penalties = {1.2f, 32, 0.1f, 0.1f};
    if (i % 4 >= 2) options.top_logprobs = i % 6;
    if (i % 8 >= 6) options.logprobs = DrawLogprobs::kSampling;
    if (!options.plain()) {
      request.sampler =
          std::make_shared<RequestSampler>(options, model_->config().vocab_size, request.prompt);
    }
    return request;
  }

  std::vector<std::vector<SampledToken>> Run(std::unique_ptr<Backend> backend) {
    prometheus::Registry registry;
    const std::unique_ptr<Metrics> metrics = Metrics::Create(&registry);
    Engine::Options options;
    options.model_name = "tales";
    auto engine = Engine::Create(options, model_, tokenizer_, std::move(backend), metrics.get());
    EXPECT_TRUE(engine.ok()) << engine.status();
    if (!engine.ok()) return {};
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < kRequests; ++i) {
      sinks.push_back(std::make_shared<CollectingSink>());
      EXPECT_TRUE((*engine)->Submit(Request(**engine, i), sinks.back()).ok());
    }
    std::vector<std::vector<SampledToken>> outputs;
    for (int i = 0; i < kRequests; ++i) {
      const absl::StatusOr<GenerationResult>& result = sinks[i]->WaitForEnd();
      EXPECT_TRUE(result.ok()) << i << ": " << result.status();
      outputs.push_back(sinks[i]->tokens());
      if (result.ok() && IsJson(i) && result->reason != FinishReason::kLength) ++finished_json_;
    }
    return outputs;
  }

  std::string Text(const std::vector<SampledToken>& tokens) const {
    std::vector<int32_t> ids;
    for (const SampledToken& token : tokens) ids.push_back(token.token);
    return *tokenizer_->Decode(ids, false);
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  int finished_json_ = 0;  // over all runs
};

TEST_F(ConstrainedEngineTest, GivesTheSameTokensOnBoth) {
  CpuBackendOptions cpu;
  cpu.num_slots = 16;
  CudaBackendOptions cuda;
  cuda.num_slots = 40;  // other batches than on the CPU
  const auto expected = Run(*CreateCpuBackend(model_, cpu));
  const auto actual = Run(*CreateCudaBackend(*model_, cuda));
  ASSERT_EQ(expected.size(), actual.size());
  int parsed = 0;
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_EQ(Text(expected[i]), Text(actual[i])) << i;
    ASSERT_EQ(expected[i].size(), actual[i].size()) << i;
    for (size_t n = 0; n < expected[i].size(); ++n) {
      ASSERT_TRUE(SameDraw(expected[i][n], actual[i][n]))
          << i << " token " << n << ": cpu " << ToString(expected[i][n]) << ", cuda "
          << ToString(actual[i][n]);
    }
    if (IsJson(i) && nlohmann::json::accept(Text(actual[i]))) ++parsed;
  }
  EXPECT_GT(parsed, kRequests / 4);
  EXPECT_EQ(2 * parsed, finished_json_);
}

}  // namespace
}  // namespace mmfree
