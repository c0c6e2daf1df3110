// The CUDA backend computes the bytes of the CPU backend: logits, samples, scores and states, for
// every batch size, chunking and choice of kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

using Kernels = CudaBackendOptions::Kernels;

struct Subject {
  std::string name;
  ModelConfig config;
  Kernels kernels = Kernels::kAuto;
  bool use_graphs = true;
  std::vector<int32_t> batches = {1, 2, 3, 8, 17, 64, 256, 1000};
  std::string cpu_isa = "scalar";
};

ModelConfig Shape(int64_t vocab, int64_t hidden, int64_t intermediate, int64_t layers) {
  ModelConfig config;
  config.vocab_size = vocab;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.num_layers = layers;
  return config;
}

std::vector<Subject> Subjects() {
  std::vector<Subject> subjects;
  const std::pair<const char*, Kernels> choices[] = {{"Auto", Kernels::kAuto},
                                                     {"Generic", Kernels::kGeneric},
                                                     {"Wide", Kernels::kWide},
                                                     {"Decode", Kernels::kDecode},
                                                     {"Persistent", Kernels::kPersistent},
                                                     {"Cluster", Kernels::kCluster}};
  const std::pair<const char*, ModelConfig> shapes[] = {
      {"Lanes", Shape(512, 512, 768, 3)}, {"Aligned", Shape(512, 256, 384, 3)},
      {"Odd", Shape(1001, 333, 517, 2)},  {"Tiny", Shape(3, 1, 3, 1)},
      {"Narrow", Shape(97, 40, 24, 2)},
  };
  for (const auto& [shape_name, config] : shapes) {
    for (const auto& [choice_name, kernels] : choices) {
      Subject subject;
      subject.name = std::string(shape_name) + choice_name;
      subject.config = config;
      subject.kernels = kernels;
      subjects.push_back(subject);
    }
  }
  // Norms so small that the clamp of the smallest maximum acts: of two stacked norms, of one.
  for (const auto& [eps_name, eps] : {std::pair("SmallNorms", 1e6f), {"TinyNorms", 1e11f}}) {
    for (const auto& [choice_name, kernels] : choices) {
      Subject subject;
      subject.name = std::string(eps_name) + choice_name;
      subject.config = kernels == Kernels::kCluster ? Shape(97, 256, 512, 2) : Shape(97, 40, 24, 2);
      subject.config.rms_norm_eps = eps;
      subject.kernels = kernels;
      subject.batches = {1, 2, 3, 64};
      subjects.push_back(subject);
    }
  }
  Subject eager = subjects[0];
  eager.name = "AlignedEager";
  eager.use_graphs = false;
  subjects.push_back(eager);
  // More layers than the persistent kernel has sets of exchange buffers.
  Subject deep;
  deep.name = "DeepPersistent";
  deep.config = Shape(97, 512, 256, 7);
  deep.kernels = Kernels::kPersistent;
  deep.batches = {1, 2};
  subjects.push_back(deep);
  Subject persistent = deep;
  persistent.name = "Shape370mPersistent";
  persistent.config = *ConfigForShape("370m");
  persistent.cpu_isa = "auto";
  subjects.push_back(persistent);
  // Rows so long that a thread has several quads of one (quantize_row.cu).
  Subject long_rows;
  long_rows.name = "LongRowsWide";
  long_rows.config = Shape(97, 2820, 4200, 1);
  long_rows.kernels = Kernels::kWide;
  long_rows.cpu_isa = "auto";
  long_rows.batches = {1, 3, 64, 300};
  subjects.push_back(long_rows);
  // The published shapes. Their reference is the fastest CPU kernels, which their own tests hold to
  // the scalar ones; the small batches are enough for the choices that small models cover.
  for (const std::string shape : {"tales", "370m", "1.3b", "2.7b"}) {
    Subject subject;
    subject.name = "Shape" + shape.substr(0, shape.find('.')) +
                   (shape == "1.3b" || shape == "2.7b" ? "p" + shape.substr(2) : "");
    subject.config = *ConfigForShape(shape);
    subject.cpu_isa = "auto";
    subjects.push_back(subject);
  }
  return subjects;
}

class EqualityTest : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    const Subject& subject = GetParam();
    BackendPair::Options options;
    options.num_slots = std::max(subject.batches.back(), 8);
    options.max_step_tokens = 1024;
    options.kernels = subject.kernels;
    options.use_graphs = subject.use_graphs;
    options.cpu_isa = subject.cpu_isa;
    absl::StatusOr<BackendPair> pair =
        BackendPair::Create(Model::Random(subject.config, 20260101), options);
    ASSERT_TRUE(pair.ok()) << pair.status();
    pair_ = std::make_unique<BackendPair>(*std::move(pair));
  }

  std::unique_ptr<BackendPair> pair_;
};

TEST_P(EqualityTest, EveryBatchSize) {
  RowMaker maker(GetParam().config, 1);
  for (const int32_t batch : GetParam().batches) {
    const std::string what = "batch " + std::to_string(batch);
    maker.Clear();
    std::vector<StepRow> rows;
    for (int32_t slot = 0; slot < batch; ++slot) {
      rows.push_back(maker.Make(slot, 1, LogitsMode::kLast, maker.Uniform(0, 3) == 0));
    }
    std::reverse(rows.begin(), rows.end());
    pair_->Step(rows, what);
    for (int32_t slot = 0; slot < batch && !HasFailure(); ++slot) {
      pair_->ExpectEqualState(slot, what);
    }
    ASSERT_FALSE(HasFailure());
  }
}

// What one step leaves behind on the device must not reach into the next.
TEST_P(EqualityTest, SmallStepsInTurn) {
  RowMaker maker(GetParam().config, 5);
  for (int n = 0; n < 10; ++n) {
    const std::string what = "step " + std::to_string(n);
    maker.Clear();
    // One or two rows, of which one or none is sampled: a step with and without a head.
    std::vector<StepRow> rows = {
        maker.Make(0, 1, n % 3 == 2 ? LogitsMode::kNone : LogitsMode::kLast, false)};
    if (n % 3 == 2) rows[0].sampling = nullptr;
    if (n % 4 > 1) {
      rows.insert(rows.begin(), maker.Make(1, 1, LogitsMode::kNone, false));
      rows[0].sampling = nullptr;
    }
    pair_->Step(rows, what);
    for (const int32_t slot : {0, 1}) pair_->ExpectEqualState(slot, what);
    ASSERT_FALSE(HasFailure());
  }
}

TEST_P(EqualityTest, ChunksAndDecodingRowsTogether) {
  RowMaker maker(GetParam().config, 2);
  // Tokens a row; a step may mix single tokens with chunks that end anywhere in a tile.
  const std::vector<std::vector<int32_t>> steps = {
      {1, 5},       {64, 1, 1}, {65, 3, 1, 130}, {1, 1, 1}, {257}, {500, 1, 2, 1, 7, 1, 63},
      {900, 1, 40}, {256},      {512, 256},      {768, 1}};
  for (size_t n = 0; n < steps.size(); ++n) {
    const std::string what = "mixed step " + std::to_string(n);
    maker.Clear();
    std::vector<StepRow> rows;
    for (size_t slot = 0; slot < steps[n].size(); ++slot) {
      // All logits of a chunk of a large vocabulary would take longer to compare than to compute.
      const bool all = steps[n][slot] <= 8;
      rows.push_back(maker.Make(static_cast<int32_t>(slot), steps[n][slot],
                                all ? LogitsMode::kAll : LogitsMode::kLast, slot % 2 == 1));
    }
    if (n == 2) rows[0].sampling = nullptr;
    if (n == 2) rows[0].logits = LogitsMode::kNone;
    pair_->Step(rows, what);
    for (size_t slot = 0; slot < steps[n].size() && !HasFailure(); ++slot) {
      pair_->ExpectEqualState(static_cast<int32_t>(slot), what);
    }
    ASSERT_FALSE(HasFailure());
  }
}

TEST_P(EqualityTest, StatesSurviveCopiesAndTheHost) {
  RowMaker maker(GetParam().config, 3);
  pair_->Step({maker.Make(0, 9, LogitsMode::kNone, false)}, "first chunk");
  std::vector<float> state(GetParam().config.state_floats());
  for (Backend* backend : {&pair_->cpu(), &pair_->cuda()}) {
    ASSERT_TRUE(backend->ReadSlot(0, absl::MakeSpan(state)).ok());
    ASSERT_TRUE(backend->WriteSlot(3, state).ok());
    ASSERT_TRUE(backend->CopySlot(3, 5).ok());
    ASSERT_TRUE(backend->ZeroSlot(3).ok());
  }
  pair_->Step(
      {maker.Make(5, 1, LogitsMode::kLast, false), maker.Make(3, 2, LogitsMode::kLast, false)},
      "after copies");
  for (const int32_t slot : {0, 3, 5, 7}) pair_->ExpectEqualState(slot, "after copies");
}

TEST_P(EqualityTest, RowsThatAreTakenBack) {
  RowMaker maker(GetParam().config, 4);
  // Tokens of two rewindable rows; beside them nothing, a decoding row, a long chunk.
  const std::pair<int32_t, int32_t> steps[] = {{2, 1}, {5, 9}, {1, 1}, {3, 8}, {17, 4}, {65, 7}};
  for (size_t n = 0; n < std::size(steps); ++n) {
    const std::string what = "step " + std::to_string(n);
    const auto [first, second] = steps[n];
    maker.Clear();
    std::vector<StepRow> rows = {maker.MakeInner(0, first, n == 1),
                                 maker.MakeInner(1, second, false)};
    for (StepRow& row : rows) row.rewindable = true;
    if (n % 3 > 0) rows.push_back(maker.Make(2, 1, LogitsMode::kLast, false));
    if (n % 3 > 1) rows.push_back(maker.Make(3, 70, LogitsMode::kNone, false));
    std::rotate(rows.begin(), rows.begin() + n % 2, rows.end());
    pair_->Step(rows, what);
    if (HasFailure()) return;
    pair_->Rewind(0, maker.Uniform(1, first), what);
    pair_->Rewind(1, maker.Uniform(1, second), what);
    for (int32_t slot = 0; slot < 4 && !HasFailure(); ++slot) {
      pair_->ExpectEqualState(slot, what);
    }
    ASSERT_FALSE(HasFailure());
  }
}

INSTANTIATE_TEST_SUITE_P(Subjects, EqualityTest, testing::ValuesIn(Subjects()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mmfree
