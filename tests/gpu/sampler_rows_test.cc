// Rows that have a TokenSampler get the CPU backend's tokens, probabilities and alternatives,
// whether the device makes their draws or the host does, beside rows that have none, in graph steps
// and in mixed ones.
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

// Says nothing about its draws, so that the host makes them.
class SilentSampler final : public TokenSampler {
 public:
  explicit SilentSampler(RequestSampler* sampler) : sampler_(*sampler) {}
  SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                      uint64_t position) override {
    return sampler_.Sample(logits, params, position);
  }

 private:
  RequestSampler& sampler_;
};

struct Sequence {
  std::unique_ptr<RequestSampler> sampler;  // null: SamplingParams say all
  std::unique_ptr<SilentSampler> silent;
  SamplingParams params;
  std::vector<int32_t> tokens;  // to be fed in the next step
  uint64_t position = 0;
};

// Half of the tokens are words of a few letters, the others bytes.
Vocabulary MakeVocabulary(int64_t vocab) {
  std::vector<std::string> bytes(3);
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(std::string(1, static_cast<char>(byte)));
  while (static_cast<int64_t>(bytes.size()) < vocab) {
    const size_t n = bytes.size();
    bytes.push_back({static_cast<char>('a' + n % 26), static_cast<char>('a' + n / 26 % 26)});
  }
  const auto trie = std::make_shared<const TokenTrie>(bytes);
  return {trie, trie};
}

// What sequence n asks for.
RequestSampler::Options MakeOptions(size_t n, ConstraintCache* constraints) {
  RequestSampler::Options options;
  switch (n % 6) {
    case 0:
      options.filters = {40, 0.95f, 0.9f, 0.001f};
      options.top_logprobs = 3;
      break;
    case 1:
      options.penalties = {1.3f, 16, 0.3f, 0.2f};
      options.bias = {{11, 2.5f}, {12, -3.0f}};
      break;
    case 2:
      options.allowed = {4, 5, 6, 90};
      options.logprobs = DrawLogprobs::kSampling;
      options.top_logprobs = 20;
      break;
    case 3:
    case 4:
      options.constraint = *constraints->Compile(
          ConstraintCache::Kind::kRegex, n % 2 == 0 ? "[a-m ]{2,40}" : "([a-z]+ [0-9]{1,3},)*");
      options.end_tokens = {2};
      if (n % 2 == 0) options.logprobs = DrawLogprobs::kNone;
      break;
    default:
      options.filters.top_p = 0.5f;
      options.banned = {7, 8, 9};
      options.top_logprobs = 21;  // more than a device lists
      break;
  }
  return options;
}

std::vector<Sequence> MakeSequences(size_t count, int64_t vocab, ConstraintCache* constraints) {
  std::vector<Sequence> sequences(count);
  for (size_t n = 0; n < count; ++n) {
    Sequence& sequence = sequences[n];
    sequence.tokens = {1, static_cast<int32_t>(n % 200) + 3, 20, 7};
    sequence.params.temperature = n % 4 == 3 ? 0.0f : 0.8f;
    sequence.params.seed = 100 + n;
    if (n % 3 == 2) continue;
    sequence.sampler = std::make_unique<RequestSampler>(MakeOptions(n / 3 + n, constraints), vocab,
                                                        sequence.tokens);
    sequence.params.sampler = sequence.sampler.get();
    if (n % 9 == 4) {
      sequence.silent = std::make_unique<SilentSampler>(sequence.sampler.get());
      sequence.params.sampler = sequence.silent.get();
    }
  }
  return sequences;
}

struct Subject {
  std::string name;
  int64_t vocab;
  size_t sequences;
  int steps;
};

class SamplerRowsTest : public testing::TestWithParam<Subject> {};

TEST_P(SamplerRowsTest, AreTheCpuBackendsInGraphAndMixedSteps) {
  MMFREE_SKIP_WITHOUT_GPU();
  const Subject& subject = GetParam();
  ModelConfig config;
  config.vocab_size = subject.vocab;
  config.hidden_size = 256;
  config.intermediate_size = 384;
  config.num_layers = 2;
  BackendPair::Options options;
  options.num_slots = static_cast<int32_t>(subject.sequences);
  options.max_step_tokens = 4 * options.num_slots;
  options.cpu_isa = "auto";
  absl::StatusOr<BackendPair> pair = BackendPair::Create(Model::Random(config, 5), options);
  ASSERT_TRUE(pair.ok()) << pair.status();
  ConstraintCache constraints([&] { return MakeVocabulary(subject.vocab); });
  std::vector<Sequence> sequences = MakeSequences(subject.sequences, subject.vocab, &constraints);
  for (int step = 0; step < subject.steps; ++step) {
    std::vector<StepRow> rows;
    for (size_t n = 0; n < sequences.size(); ++n) {
      if (sequences[n].tokens.empty()) continue;
      StepRow& row = rows.emplace_back();
      row.slot = static_cast<int32_t>(n);
      row.tokens = sequences[n].tokens;
      row.position = sequences[n].position;
      row.sampling = &sequences[n].params;
      if (n == 3 && step % 3 == 0) row.logits = LogitsMode::kLast;
    }
    const StepOutput output = pair->Step(rows, "step " + std::to_string(step));
    ASSERT_FALSE(HasFailure());
    for (size_t i = 0; i < rows.size(); ++i) {
      Sequence& sequence = sequences[rows[i].slot];
      sequence.position += sequence.tokens.size();
      const int32_t token = output.samples[i].token;
      sequence.tokens.clear();
      if (token < 0) continue;  // a constraint that nothing can follow
      if (sequence.sampler != nullptr) {
        sequence.sampler->Append(token);
        if (sequence.sampler->dead()) continue;  // ended
      }
      sequence.tokens = {token};
      // Now and then a chunk beside the single tokens, so that the step is not a graph.
      if (step % 5 == 4 && rows[i].slot == 2) sequence.tokens = {token, 9, 8, 7, 6};
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Subjects, SamplerRowsTest,
                         testing::Values(Subject{"One", 513, 1, 40}, Subject{"Two", 513, 2, 20},
                                         Subject{"Many", 513, 40, 24},
                                         Subject{"WholeVocabulary", 32000, 70, 8},
                                         Subject{"LargeVocabulary", 65537, 12, 6},
                                         Subject{"ManyHeads", 300, 1100, 3}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mmfree
