#include "tests/gpu/backend_pair.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "server/backends/cpu/cpu_backend.h"
#include "server/base/status_macros.h"
#include "tests/support/random_draws.h"

namespace mmfree {
namespace {

bool SameBits(float a, float b) { return memcmp(&a, &b, sizeof(a)) == 0; }
bool SameBits(const SampledToken& a, const SampledToken& b) { return SameDraw(a, b); }
bool SameBits(const TokenScore& a, const TokenScore& b) {
  return a.argmax == b.argmax && SameBits(a.logprob, b.logprob);
}

// Index of the first element that differs in a bit, or the size.
template <typename T>
size_t FirstDifference(absl::Span<const T> a, absl::Span<const T> b) {
  size_t i = 0;
  while (i < a.size() && SameBits(a[i], b[i])) ++i;
  return i;
}

template <typename T>
size_t CountDifferences(absl::Span<const T> a, absl::Span<const T> b) {
  size_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += SameBits(a[i], b[i]) ? 0 : 1;
  return count;
}

void ExpectSameFloats(absl::Span<const float> cpu, absl::Span<const float> cuda, size_t row_size,
                      const std::string& what) {
  ASSERT_EQ(cpu.size(), cuda.size()) << what;
  const size_t at = FirstDifference(cpu, cuda);
  if (at == cpu.size()) return;
  ADD_FAILURE() << what << ": " << CountDifferences(cpu, cuda) << " of " << cpu.size()
                << " differ, first at row " << at / row_size << " column " << at % row_size
                << ": cpu " << cpu[at] << ", cuda " << cuda[at];
}

void ExpectSameSamples(absl::Span<const SampledToken> cpu, absl::Span<const SampledToken> cuda,
                       const std::string& what) {
  const size_t at = FirstDifference(cpu, cuda);
  if (at == cpu.size()) return;
  ADD_FAILURE() << what << " " << at << ": cpu " << ToString(cpu[at]) << ", cuda "
                << ToString(cuda[at]);
}

}  // namespace

std::string TestDataDirectory() {
  const char* const directory = std::getenv("MMFREE_TEST_DATA");
  return directory != nullptr ? directory : MMFREE_SOURCE_DIR;
}

absl::StatusOr<BackendPair> BackendPair::Create(std::shared_ptr<const Model> model,
                                                const Options& options) {
  BackendPair pair;
  pair.model_ = std::move(model);
  CpuBackendOptions cpu;
  cpu.isa = options.cpu_isa;
  cpu.num_slots = options.num_slots;
  cpu.max_step_tokens = options.max_step_tokens;
  MMFREE_ASSIGN_OR_RETURN(pair.cpu_, CreateCpuBackend(pair.model_, cpu));
  CudaBackendOptions cuda;
  cuda.num_slots = options.num_slots;
  cuda.max_step_tokens = options.max_step_tokens;
  cuda.kernels = options.kernels;
  cuda.use_graphs = options.use_graphs;
  MMFREE_ASSIGN_OR_RETURN(pair.cuda_, CreateCudaBackend(*pair.model_, cuda));
  return pair;
}

StepOutput BackendPair::Step(absl::Span<const StepRow> rows, const std::string& what) {
  StepOutput expected;
  StepOutput actual;
  const absl::Status cpu = cpu_->Step(rows, &expected);
  const absl::Status cuda = cuda_->Step(rows, &actual);
  EXPECT_TRUE(cpu.ok()) << what << ": " << cpu;
  EXPECT_TRUE(cuda.ok()) << what << ": " << cuda;
  if (!cpu.ok() || !cuda.ok()) return expected;
  ExpectSameFloats(expected.logits, actual.logits, model_->config().vocab_size, what + ": logits");
  EXPECT_EQ(expected.samples.size(), actual.samples.size()) << what;
  EXPECT_EQ(expected.inner_samples.size(), actual.inner_samples.size()) << what;
  EXPECT_EQ(expected.scores.size(), actual.scores.size()) << what;
  if (testing::Test::HasFailure()) return expected;
  ExpectSameSamples(expected.samples, actual.samples, what + ": sample of row");
  ExpectSameSamples(expected.inner_samples, actual.inner_samples, what + ": inner sample");
  const absl::Span<const TokenScore> scores = expected.scores;
  if (const size_t at = FirstDifference(scores, absl::MakeConstSpan(actual.scores));
      at < scores.size()) {
    ADD_FAILURE() << what << ": score " << at << ": cpu " << scores[at].argmax << " "
                  << scores[at].logprob << ", cuda " << actual.scores[at].argmax << " "
                  << actual.scores[at].logprob;
  }
  return expected;
}

void BackendPair::Rewind(int32_t slot, int32_t tokens, const std::string& what) {
  for (Backend* backend : {cpu_.get(), cuda_.get()}) {
    const absl::Status status = backend->Rewind(slot, tokens);
    EXPECT_TRUE(status.ok()) << what << ": " << status;
  }
}

void BackendPair::ExpectEqualState(int32_t slot, const std::string& what) {
  const size_t size = static_cast<size_t>(model_->config().state_floats());
  std::vector<float> expected(size);
  std::vector<float> actual(size, -1.0f);
  ASSERT_TRUE(cpu_->ReadSlot(slot, absl::MakeSpan(expected)).ok());
  const absl::Status cuda = cuda_->ReadSlot(slot, absl::MakeSpan(actual));
  ASSERT_TRUE(cuda.ok()) << what << ": " << cuda;
  ExpectSameFloats(expected, actual, model_->config().hidden_size,
                   what + ": state of slot " + std::to_string(slot));
}

void RowMaker::Clear() { storage_.clear(); }

int32_t RowMaker::Uniform(int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(random_);
}

void RowMaker::AddSampling(Storage* storage) {
  SamplingParams& sampling = storage->sampling.emplace_back();
  sampling.temperature = Uniform(0, 2) == 0 ? 0.0f : 0.01f * static_cast<float>(Uniform(1, 300));
  sampling.seed = random_();
  sampling.candidate = static_cast<uint32_t>(Uniform(0, 3));
  if (Uniform(0, 3) > 0) return;
  const int32_t last_id = static_cast<int32_t>(config_.vocab_size) - 1;
  std::vector<int32_t>& banned = storage->banned.emplace_back();
  banned.resize(static_cast<size_t>(Uniform(1, std::min(kMaxBannedTokens, last_id))));
  for (int32_t& id : banned) id = Uniform(0, last_id);
  sampling.banned = banned;
}

StepRow RowMaker::Make(int32_t slot, int32_t count, LogitsMode logits, bool scored) {
  storage_.push_back(std::make_unique<Storage>());
  Storage& storage = *storage_.back();
  const int32_t last_id = static_cast<int32_t>(config_.vocab_size) - 1;
  for (int32_t i = 0; i < count; ++i) storage.tokens.push_back(Uniform(0, last_id));
  AddSampling(&storage);
  StepRow row;
  row.slot = slot;
  row.tokens = storage.tokens;
  row.position = random_() >> 20;
  row.sampling = storage.sampling.data();
  row.logits = logits;
  if (scored) {
    for (int32_t i = 0; i < count; ++i) storage.targets.push_back(Uniform(-1, last_id));
    row.targets = storage.targets;
  }
  return row;
}

StepRow RowMaker::MakeInner(int32_t slot, int32_t count, bool scored) {
  StepRow row = Make(slot, count, LogitsMode::kNone, scored);
  Storage& storage = *storage_.back();
  while (storage.sampling.size() < row.tokens.size()) AddSampling(&storage);
  row.inner = absl::MakeConstSpan(storage.sampling).first(row.tokens.size() - 1);
  row.sampling = &storage.sampling.back();
  return row;
}

}  // namespace mmfree
