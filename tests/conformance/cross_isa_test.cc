// The bit-identity contract on the CPU: logits, states and sampled tokens are the same bytes on
// every instruction set, for every thread count, batch size and prefill chunking. The reference is
// the scalar backend with one thread, fed one token at a time, one sequence after the other.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "server/backends/backend.h"
#include "server/backends/cpu/cpu_backend.h"
#include "server/base/cpu_features.h"
#include "server/base/numerics.h"
#include "server/base/philox.h"
#include "server/model/model.h"

namespace mmfree {
namespace {

constexpr int32_t kWhole = 1 << 20;  // a chunk that takes any prompt whole

// What the backend produced for one sequence.
struct SequenceResult {
  std::vector<float> logits;  // [tokens, vocab]
  std::vector<float> state;
  std::vector<TokenScore> scores;
  SampledToken sample;
};

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<int32_t> targets;
  SamplingParams sampling;
};

// `count` sequences: a long one, then short ones of all lengths up to `longest_short`.
std::vector<Sequence> MakeSequences(int count, int longest, int longest_short, int64_t vocab) {
  std::vector<Sequence> sequences(count);
  for (int s = 0; s < count; ++s) {
    const int length = s == 0 ? longest : 1 + s % longest_short;
    for (int t = 0; t <= length; ++t) {
      const uint64_t bits = UniformBits(static_cast<uint64_t>(s), static_cast<uint64_t>(t), 0, 0);
      const int32_t token = static_cast<int32_t>(bits % static_cast<uint64_t>(vocab));
      if (t < length) sequences[s].tokens.push_back(token);
      if (t > 0) sequences[s].targets.push_back(token);
    }
    sequences[s].sampling.temperature = s % 3 == 0 ? 0.0f : 0.5f * static_cast<float>(s % 3);
    sequences[s].sampling.seed = static_cast<uint64_t>(s);
  }
  return sequences;
}

// Feeds the sequences `batch` at a time, each in chunks of up to `chunk` tokens.
std::vector<SequenceResult> Feed(Backend& backend, const std::vector<Sequence>& sequences,
                                 int batch, int chunk) {
  std::vector<SequenceResult> results(sequences.size());
  for (size_t first = 0; first < sequences.size(); first += static_cast<size_t>(batch)) {
    const size_t last = std::min(sequences.size(), first + static_cast<size_t>(batch));
    for (size_t s = first; s < last; ++s) {
      EXPECT_TRUE(backend.ZeroSlot(static_cast<int32_t>(s - first)).ok());
    }
    for (size_t fed = 0;; fed += static_cast<size_t>(chunk)) {
      std::vector<StepRow> rows;
      std::vector<size_t> sequence_of;
      for (size_t s = first; s < last; ++s) {
        const Sequence& sequence = sequences[s];
        if (fed >= sequence.tokens.size()) continue;
        StepRow row;
        row.slot = static_cast<int32_t>(s - first);
        row.tokens = absl::MakeConstSpan(sequence.tokens).subspan(fed, chunk);
        row.targets = absl::MakeConstSpan(sequence.targets).subspan(fed, chunk);
        row.position = fed;
        row.logits = LogitsMode::kAll;
        if (fed + row.tokens.size() == sequence.tokens.size()) row.sampling = &sequence.sampling;
        rows.push_back(row);
        sequence_of.push_back(s);
      }
      if (rows.empty()) break;
      StepOutput out;
      const absl::Status status = backend.Step(rows, &out);
      EXPECT_TRUE(status.ok()) << status;
      size_t position = 0;
      const size_t vocab = out.logits.size() / std::max<size_t>(1, out.scores.size());
      for (size_t r = 0; r < rows.size(); ++r) {
        SequenceResult& result = results[sequence_of[r]];
        const size_t count = rows[r].tokens.size();
        const auto logits = out.logits.begin() + static_cast<ptrdiff_t>(position * vocab);
        result.logits.insert(result.logits.end(), logits,
                             logits + static_cast<ptrdiff_t>(count * vocab));
        const auto scores = out.scores.begin() + static_cast<ptrdiff_t>(position);
        result.scores.insert(result.scores.end(), scores, scores + static_cast<ptrdiff_t>(count));
        if (rows[r].sampling != nullptr) result.sample = out.samples[r];
        position += count;
      }
    }
    for (size_t s = first; s < last; ++s) {
      results[s].state.resize(static_cast<size_t>(backend.info().state_floats));
      EXPECT_TRUE(
          backend.ReadSlot(static_cast<int32_t>(s - first), absl::MakeSpan(results[s].state)).ok());
    }
  }
  return results;
}

bool SameBytes(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool SameBytes(float a, float b) { return FloatToBits(a) == FloatToBits(b); }

void ExpectSame(const std::vector<SequenceResult>& expected,
                const std::vector<SequenceResult>& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  for (size_t s = 0; s < expected.size(); ++s) {
    SCOPED_TRACE(absl::StrCat("sequence ", s));
    EXPECT_TRUE(SameBytes(expected[s].logits, actual[s].logits)) << "logits differ";
    EXPECT_TRUE(SameBytes(expected[s].state, actual[s].state)) << "states differ";
    EXPECT_EQ(expected[s].sample.token, actual[s].sample.token);
    EXPECT_TRUE(SameBytes(expected[s].sample.logprob, actual[s].sample.logprob));
    ASSERT_EQ(expected[s].scores.size(), actual[s].scores.size());
    for (size_t t = 0; t < expected[s].scores.size(); ++t) {
      EXPECT_EQ(expected[s].scores[t].argmax, actual[s].scores[t].argmax);
      EXPECT_TRUE(SameBytes(expected[s].scores[t].logprob, actual[s].scores[t].logprob));
    }
  }
}

std::unique_ptr<Backend> MakeBackend(std::shared_ptr<const Model> model, CpuIsa isa, int threads) {
  CpuBackendOptions options;
  options.isa = std::string(CpuIsaName(isa));
  options.threads = threads;
  options.num_slots = 32;
  options.max_step_tokens = 2048;
  auto backend = CreateCpuBackend(std::move(model), options);
  EXPECT_TRUE(backend.ok()) << backend.status();
  return backend.ok() ? *std::move(backend) : nullptr;
}

// A model, sequences for it, and what the reference makes of them.
struct Case {
  std::shared_ptr<const Model> model;
  std::vector<Sequence> sequences;
  std::vector<SequenceResult> expected;

  Case(std::shared_ptr<const Model> m, int count, int longest, int longest_short)
      : model(std::move(m)),
        sequences(MakeSequences(count, longest, longest_short, model->config().vocab_size)) {
    const std::unique_ptr<Backend> reference = MakeBackend(model, CpuIsa::kScalar, 1);
    if (reference != nullptr) expected = Feed(*reference, sequences, 1, 1);
  }
};

// The demo checkpoint; null where it is not. MMFREE_TEST_DATA stands in for the source directory
// when the tests run on another machine.
const Case* DemoCase() {
  static const Case* const kCase = []() -> const Case* {
    const char* data = std::getenv("MMFREE_TEST_DATA");
    auto model = Model::Load(
        absl::StrCat(data != nullptr ? data : MMFREE_SOURCE_DIR, "/deploy/models/tales"));
    return model.ok() ? new Case(*model, 32, 70, 4) : nullptr;
  }();
  return kCase;
}

class CrossIsaTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!CpuSupports(GetParam())) {
      GTEST_SKIP() << "this processor (" << CpuModelName() << ") has no " << CpuIsaName(GetParam());
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, CrossIsaTest,
                         testing::Values(CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvxVnni,
                                         CpuIsa::kAvx512, CpuIsa::kAvx512Gfni, CpuIsa::kAmx),
                         [](const testing::TestParamInfo<CpuIsa>& info) {
                           return std::string(CpuIsaName(info.param));
                         });

TEST_P(CrossIsaTest, DemoModelGivesTheSameBytesForEveryThreadCountBatchAndChunk) {
  const Case* demo = DemoCase();
  if (demo == nullptr) GTEST_SKIP() << "deploy/models/tales is not there";
  using Setup = std::tuple<int, int, int>;  // threads, batch, chunk
  std::vector<Setup> setups;
  if (GetParam() == CpuIsa::kScalar) {
    // The oracle is slow: each value once.
    setups = {{2, 7, 5}, {3, 32, kWhole}};
  } else {
    for (int threads : {1, 2, 3}) {
      for (int batch : {1, 2, 7, 32}) {
        for (int chunk : {1, 5, 64, kWhole}) setups.emplace_back(threads, batch, chunk);
      }
    }
  }
  for (const auto& [threads, batch, chunk] : setups) {
    SCOPED_TRACE(absl::StrCat(threads, " threads, batch ", batch, ", chunk ", chunk));
    const std::unique_ptr<Backend> backend = MakeBackend(demo->model, GetParam(), threads);
    ASSERT_NE(backend, nullptr);
    ExpectSame(demo->expected, Feed(*backend, demo->sequences, batch, chunk));
  }
}

// Sizes that are multiples of nothing, a single channel, and more tokens than one pass takes.
TEST_P(CrossIsaTest, OddShapesGiveTheSameBytes) {
  struct Shape {
    int64_t vocab, hidden, intermediate, layers;
  };
  for (const Shape& shape : {Shape{131, 90, 150, 1}, Shape{37, 20, 75, 3}, Shape{1001, 257, 511, 2},
                             Shape{2, 1, 1, 2}, Shape{65, 63, 65, 1}, Shape{33, 320, 1000, 1}}) {
    SCOPED_TRACE(absl::StrCat("hidden ", shape.hidden));
    ModelConfig config;
    config.vocab_size = shape.vocab;
    config.hidden_size = shape.hidden;
    config.intermediate_size = shape.intermediate;
    config.num_layers = shape.layers;
    config.bos_token_id = 0;
    config.eos_token_id = 1;
    const Case odd(Model::Random(config, 17), 9, shape.hidden == 20 ? 300 : 70, 3);
    for (int threads : {1, 3}) {
      const std::unique_ptr<Backend> backend = MakeBackend(odd.model, GetParam(), threads);
      ASSERT_NE(backend, nullptr);
      for (int batch : {1, 7}) {
        for (int chunk : {5, 64, kWhole}) {
          if (GetParam() == CpuIsa::kScalar && chunk == 64) continue;  // slow, and like the others
          SCOPED_TRACE(absl::StrCat(threads, " threads, batch ", batch, ", chunk ", chunk));
          ExpectSame(odd.expected, Feed(*backend, odd.sequences, batch, chunk));
        }
      }
    }
  }
}

// Rows of different kinds in one step: decoding rows beside chunks of prompts.
TEST_P(CrossIsaTest, ARowDoesNotDependOnItsNeighbours) {
  const Case* demo = DemoCase();
  if (demo == nullptr) GTEST_SKIP() << "deploy/models/tales is not there";
  const std::unique_ptr<Backend> backend = MakeBackend(demo->model, GetParam(), 2);
  ASSERT_NE(backend, nullptr);
  const std::vector<int32_t>& tokens = demo->sequences[0].tokens;
  // Sequence 0 alone, then as row 1 between two others, a few tokens at a time.
  StepOutput out;
  for (size_t fed = 0; fed < 40;) {
    const size_t count = 1 + fed % 7;
    StepRow rows[3];
    rows[0].slot = 5;
    rows[0].tokens = absl::MakeConstSpan(tokens).subspan(0, 1 + fed % 3);
    rows[1].slot = 9;
    rows[1].tokens = absl::MakeConstSpan(tokens).subspan(fed, count);
    rows[1].logits = LogitsMode::kLast;
    rows[2].slot = 0;
    rows[2].tokens = absl::MakeConstSpan(tokens).subspan(fed, 1);
    ASSERT_TRUE(backend->Step(rows, &out).ok());
    fed += count;
    const size_t vocab = static_cast<size_t>(demo->model->config().vocab_size);
    const float* expected = demo->expected[0].logits.data() + (fed - 1) * vocab;
    EXPECT_EQ(memcmp(out.logits.data(), expected, vocab * sizeof(float)), 0) << fed << " tokens";
  }
}

}  // namespace
}  // namespace mmfree
