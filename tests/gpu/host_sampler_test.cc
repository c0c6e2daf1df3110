// Rows whose tokens a TokenSampler draws on the host get the CPU backend's tokens and
// probabilities, beside rows that the device samples, in graph steps and in mixed ones.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/model/model.h"
#include "server/sampling/request_sampler.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

struct Sequence {
  std::unique_ptr<RequestSampler> sampler;  // null: sampled by the device
  SamplingParams params;
  std::vector<int32_t> tokens;  // to be fed in the next step
  uint64_t position = 0;
};

std::vector<Sequence> MakeSequences(int64_t vocab) {
  std::vector<Sequence> sequences(6);
  for (size_t n = 0; n < sequences.size(); ++n) {
    sequences[n].tokens = {1, static_cast<int32_t>(n) + 3, 20, 7};
    sequences[n].params.temperature = n % 2 == 0 ? 0.8f : 0.0f;
    sequences[n].params.seed = 100 + n;
  }
  RequestSampler::Options filtered;
  filtered.filters.top_k = 40;
  filtered.filters.top_p = 0.9f;
  filtered.top_logprobs = 3;
  RequestSampler::Options penalised;
  penalised.penalties.repetition = 1.3f;
  penalised.bias = {{11, 2.5f}};
  RequestSampler::Options restricted;
  restricted.allowed = {4, 5, 6, 90};
  restricted.logprobs = RequestSampler::Logprobs::kSampling;
  const RequestSampler::Options options[] = {filtered, penalised, restricted};
  for (size_t n = 0; n < 3; ++n) {
    Sequence& sequence = sequences[2 * n + n % 2];
    sequence.sampler = std::make_unique<RequestSampler>(options[n], vocab, sequence.tokens);
    sequence.params.sampler = sequence.sampler.get();
  }
  return sequences;
}

TEST(HostSamplerTest, TokensAndProbabilitiesEqualTheCpuBackendsInGraphAndMixedSteps) {
  MMFREE_SKIP_WITHOUT_GPU();
  ModelConfig config;
  config.vocab_size = 513;
  config.hidden_size = 256;
  config.intermediate_size = 384;
  config.num_layers = 2;
  absl::StatusOr<BackendPair> pair = BackendPair::Create(Model::Random(config, 5), {});
  ASSERT_TRUE(pair.ok()) << pair.status();
  std::vector<Sequence> sequences = MakeSequences(config.vocab_size);
  for (int step = 0; step < 24; ++step) {
    std::vector<StepRow> rows;
    for (size_t n = 0; n < sequences.size(); ++n) {
      StepRow& row = rows.emplace_back();
      row.slot = static_cast<int32_t>(n);
      row.tokens = sequences[n].tokens;
      row.position = sequences[n].position;
      row.sampling = &sequences[n].params;
      if (n == 3 && step % 3 == 0) row.logits = LogitsMode::kLast;
    }
    const StepOutput output = pair->Step(rows, "step " + std::to_string(step));
    ASSERT_FALSE(HasFailure());
    for (size_t n = 0; n < sequences.size(); ++n) {
      Sequence& sequence = sequences[n];
      sequence.position += sequence.tokens.size();
      const int32_t token = output.samples[n].token;
      if (sequence.sampler != nullptr) sequence.sampler->Append(token);
      sequence.tokens = {token};
      // Now and then a chunk beside the single tokens, so that the step is not a graph.
      if (step % 5 == 4 && n == 1) sequence.tokens = {token, 9, 8, 7, 6};
    }
  }
}

}  // namespace
}  // namespace mmfree
