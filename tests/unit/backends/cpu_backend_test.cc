// The Backend contract on the CPU: slots, outputs and refusals.
#include "server/backends/cpu/cpu_backend.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/model/config.h"
#include "server/model/model.h"
#include "server/sampling/sampler.h"
#include "tests/support/status_is.h"
#include "tests/unit/backends/cpu_test_support.h"

namespace mmfree {
namespace {

using testing::HasSubstr;

constexpr int32_t kSlots = 4;
constexpr int32_t kMaxTokens = 40;
constexpr int32_t kVocab = 131;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.vocab_size = kVocab;
  config.hidden_size = 90;
  config.intermediate_size = 150;
  config.num_layers = 2;
  return config;
}

class CpuBackendTest : public testing::Test {
 protected:
  CpuBackendTest() {
    CpuBackendOptions options;
    options.threads = 2;
    options.num_slots = kSlots;
    options.max_step_tokens = kMaxTokens;
    backend_ = std::move(CreateCpuBackend(model_, options).value());
  }

  std::vector<float> State(int32_t slot) {
    std::vector<float> state(static_cast<size_t>(backend_->info().state_floats));
    EXPECT_THAT(backend_->ReadSlot(slot, absl::MakeSpan(state)), IsOk());
    return state;
  }

  // Steps one row and expects a refusal that changes nothing.
  void ExpectRefused(const StepRow& row, const std::string& message) {
    const std::vector<float> before = State(0);
    StepOutput out;
    EXPECT_THAT(backend_->Step({&row, 1}, &out),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    EXPECT_TRUE(SameBits(before, State(0)));
    EXPECT_TRUE(out.samples.empty());
  }

  const std::shared_ptr<const Model> model_ = Model::Random(SmallConfig(), 3);
  std::unique_ptr<Backend> backend_;
  const std::vector<int32_t> tokens_ = {1, 5, 130, 0, 77};
};

TEST_F(CpuBackendTest, InfoDescribesTheBackend) {
  const BackendInfo& info = backend_->info();
  EXPECT_EQ(info.name, "cpu");
  EXPECT_THAT(info.description, HasSubstr("2 threads"));
  EXPECT_EQ(info.num_slots, kSlots);
  EXPECT_EQ(info.max_step_tokens, kMaxTokens);
  EXPECT_EQ(info.state_floats, 180);
  EXPECT_EQ(info.state_bytes, kSlots * 180 * 4);
  EXPECT_GT(info.weight_bytes, model_->ternary_bytes());
}

TEST_F(CpuBackendTest, EverySlotStartsZeroed) {
  for (int32_t slot = 0; slot < kSlots; ++slot) {
    EXPECT_TRUE(SameBits(std::vector<float>(180), State(slot)));
  }
}

TEST_F(CpuBackendTest, AStepChangesItsOwnSlotAlone) {
  StepRow row;
  row.slot = 2;
  row.tokens = tokens_;
  StepOutput out;
  ASSERT_THAT(backend_->Step({&row, 1}, &out), IsOk());
  for (int32_t slot : {0, 1, 3}) EXPECT_TRUE(SameBits(std::vector<float>(180), State(slot)));
  EXPECT_FALSE(SameBits(std::vector<float>(180), State(2)));
}

TEST_F(CpuBackendTest, SlotsAreCopiedWrittenAndZeroedExactly) {
  StepRow row;
  row.tokens = tokens_;
  StepOutput out;
  ASSERT_THAT(backend_->Step({&row, 1}, &out), IsOk());
  const std::vector<float> state = State(0);
  ASSERT_THAT(backend_->CopySlot(0, 1), IsOk());
  ASSERT_THAT(backend_->CopySlot(0, 0), IsOk());
  ASSERT_THAT(backend_->WriteSlot(3, state), IsOk());
  ASSERT_THAT(backend_->ZeroSlot(0), IsOk());
  EXPECT_TRUE(SameBits(state, State(1)));
  EXPECT_TRUE(SameBits(state, State(3)));
  EXPECT_TRUE(SameBits(std::vector<float>(180), State(0)));

  // Each goes on as the original would have.
  StepRow rows[2];
  rows[0].slot = 1;
  rows[1].slot = 3;
  for (StepRow& r : rows) {
    r.tokens = tokens_;
    r.logits = LogitsMode::kLast;
  }
  ASSERT_THAT(backend_->Step(rows, &out), IsOk());
  EXPECT_TRUE(SameBits(State(1), State(3)));
  ASSERT_EQ(out.logits.size(), 2u * kVocab);
  EXPECT_TRUE(SameBits(std::vector<float>(out.logits.begin(), out.logits.begin() + kVocab),
                       std::vector<float>(out.logits.begin() + kVocab, out.logits.end())));
}

TEST_F(CpuBackendTest, OutputsAreWhatEachRowAskedFor) {
  const std::vector<int32_t> targets = {5, -1, 0, 77, 2};
  SamplingParams sampling;
  sampling.temperature = 0.8f;
  sampling.seed = 5;
  StepRow rows[4];
  for (int32_t r = 0; r < 4; ++r) {
    rows[r].slot = r;
    rows[r].tokens = tokens_;
    rows[r].position = 10;
  }
  rows[0].logits = LogitsMode::kAll;
  rows[1].sampling = &sampling;
  rows[2].targets = targets;
  rows[3].logits = LogitsMode::kLast;
  rows[3].sampling = &sampling;
  StepOutput out;
  ASSERT_THAT(backend_->Step(rows, &out), IsOk());
  ASSERT_EQ(out.samples.size(), 4u);
  ASSERT_EQ(out.scores.size(), 5u);
  ASSERT_EQ(out.logits.size(), 6u * kVocab);

  // All rows fed the same tokens, so row 0's logits define what the others must be.
  const auto logits = [&](size_t position) {
    return absl::MakeConstSpan(out.logits).subspan(position * kVocab, kVocab);
  };
  for (size_t t = 0; t < 5; ++t) {
    const TokenScore expected = ScoreToken(logits(t), targets[t]);
    EXPECT_EQ(out.scores[t].argmax, expected.argmax);
    EXPECT_TRUE(SameBits(expected.logprob, out.scores[t].logprob));
  }
  EXPECT_EQ(out.scores[1].logprob, 0.0f);
  const SampledToken expected = Sample(logits(4), sampling, 15);
  EXPECT_EQ(out.samples[0].token, -1);
  EXPECT_EQ(out.samples[2].token, -1);
  for (size_t r : {1, 3}) {
    EXPECT_EQ(out.samples[r].token, expected.token);
    EXPECT_TRUE(SameBits(expected.logprob, out.samples[r].logprob));
  }
  EXPECT_TRUE(SameBits(std::vector<float>(logits(4).begin(), logits(4).end()),
                       std::vector<float>(logits(5).begin(), logits(5).end())));
}

TEST_F(CpuBackendTest, OutputsOfAnEarlierStepDoNotRemain) {
  SamplingParams greedy;
  StepRow row;
  row.tokens = tokens_;
  row.targets = tokens_;
  row.logits = LogitsMode::kAll;
  row.sampling = &greedy;
  StepOutput out;
  ASSERT_THAT(backend_->Step({&row, 1}, &out), IsOk());
  StepRow bare;
  bare.tokens = tokens_;
  ASSERT_THAT(backend_->Step({&bare, 1}, &out), IsOk());
  ASSERT_EQ(out.samples.size(), 1u);
  EXPECT_EQ(out.samples[0].token, -1);
  EXPECT_TRUE(out.scores.empty());
  EXPECT_TRUE(out.logits.empty());
}

TEST_F(CpuBackendTest, AStepWithoutRowsDoesNothing) {
  StepOutput out;
  EXPECT_THAT(backend_->Step({}, &out), IsOk());
  EXPECT_TRUE(out.samples.empty());
}

TEST_F(CpuBackendTest, RefusesBadSlots) {
  for (int32_t slot : {-1, kSlots, std::numeric_limits<int32_t>::max()}) {
    StepRow row;
    row.slot = slot;
    row.tokens = tokens_;
    ExpectRefused(row, "slot");
    std::vector<float> state(180);
    const auto refused = StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4 slots"));
    EXPECT_THAT(backend_->ZeroSlot(slot), refused);
    EXPECT_THAT(backend_->CopySlot(slot, 0), refused);
    EXPECT_THAT(backend_->CopySlot(0, slot), refused);
    EXPECT_THAT(backend_->ReadSlot(slot, absl::MakeSpan(state)), refused);
    EXPECT_THAT(backend_->WriteSlot(slot, state), refused);
  }
  StepRow rows[2];
  for (StepRow& row : rows) row.tokens = tokens_;
  StepOutput out;
  EXPECT_THAT(backend_->Step(rows, &out),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("used by two rows")));
  EXPECT_TRUE(SameBits(std::vector<float>(180), State(0)));
}

// Stands in place of RequestSampler: says where it was asked.
class PlaceSampler final : public TokenSampler {
 public:
  SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                      uint64_t position) override {
    return {ArgMax(logits), static_cast<float>(position) + 100.0f * params.temperature};
  }
};

TEST_F(CpuBackendTest, InnerSamplesAreThoseOfTheTokensFedOneByOne) {
  PlaceSampler sampler;
  const std::vector<int32_t> banned = {3, 9, 100};
  std::vector<SamplingParams> sampling(5);
  sampling[0].temperature = 0.7f;
  sampling[0].seed = 4;
  sampling[1].banned = banned;
  sampling[3].sampler = &sampler;
  sampling[3].temperature = 2.0f;
  sampling[4].temperature = 1.3f;
  std::vector<SampledToken> expected;
  std::vector<std::vector<float>> states;
  StepOutput out;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    StepRow row;
    row.tokens = absl::MakeConstSpan(tokens_).subspan(i, 1);
    row.position = 50 + i;
    row.sampling = &sampling[i];
    ASSERT_THAT(backend_->Step({&row, 1}, &out), IsOk());
    expected.push_back(out.samples[0]);
    states.push_back(State(0));
  }
  for (int32_t kept = 1; kept <= 5; ++kept) {
    // In company of rows with and without.
    StepRow rows[3];
    const std::vector<int32_t> targets(5, 7);
    for (int32_t r = 0; r < 3; ++r) {
      rows[r].slot = r + 1;
      ASSERT_THAT(backend_->ZeroSlot(r + 1), IsOk());
      rows[r].tokens = tokens_;
      rows[r].position = 50;
      if (r == 1) continue;
      rows[r].sampling = &sampling[4];
      rows[r].inner = absl::MakeConstSpan(sampling).first(4);
      rows[r].rewindable = true;
    }
    rows[0].targets = targets;
    ASSERT_THAT(backend_->Step(rows, &out), IsOk());
    ASSERT_EQ(out.inner_samples.size(), 8u);
    ASSERT_EQ(out.scores.size(), 5u);
    for (const size_t r : {0, 2}) {
      for (size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(out.inner_samples[r * 2 + i].token, expected[i].token) << i;
        EXPECT_EQ(out.inner_samples[r * 2 + i].logprob, expected[i].logprob) << i;
      }
      EXPECT_EQ(out.samples[r].token, expected[4].token);
      EXPECT_TRUE(SameBits(State(r + 1), states[4]));
    }
    EXPECT_TRUE(SameBits(State(2), states[4]));
    ASSERT_THAT(backend_->Rewind(3, kept), IsOk());
    ASSERT_THAT(backend_->Rewind(1, 6 - kept), IsOk());
    EXPECT_TRUE(SameBits(State(3), states[kept - 1]));
    EXPECT_TRUE(SameBits(State(1), states[5 - kept]));
    EXPECT_TRUE(SameBits(State(2), states[4]));
  }
}

TEST_F(CpuBackendTest, OnlyARewindableRowOfTheLastStepIsTakenBack) {
  const auto refused = [this](int32_t slot, int32_t tokens, const std::string& message) {
    EXPECT_THAT(backend_->Rewind(slot, tokens),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  refused(0, 1, "slot 0 had no rewindable row");
  StepRow rows[2];
  rows[1].slot = 1;
  rows[0].tokens = rows[1].tokens = tokens_;
  rows[0].rewindable = true;
  StepOutput out;
  ASSERT_THAT(backend_->Step(rows, &out), IsOk());
  refused(1, 1, "slot 1 had no rewindable row");
  refused(0, 0, "rewind to 0 of a row's 5 tokens");
  refused(0, 6, "rewind to 6");
  ASSERT_THAT(backend_->Step({&rows[1], 1}, &out), IsOk());
  refused(0, 1, "slot 0 had no rewindable row");
}

TEST_F(CpuBackendTest, RefusesRowsThatWouldKeepTooManyStates) {
  const std::vector<int32_t> tokens(kMaxKeptStates + 2, 1);
  CpuBackendOptions options;
  options.threads = 2;
  options.num_slots = kSlots;
  options.max_step_tokens = static_cast<int32_t>(tokens.size());
  backend_ = std::move(CreateCpuBackend(model_, options).value());
  StepRow row;
  row.tokens = tokens;
  StepOutput out;
  EXPECT_THAT(backend_->Step({&row, 1}, &out), IsOk());
  row.rewindable = true;
  ExpectRefused(row, "129 states, at most 128");
  row.tokens = absl::MakeConstSpan(tokens).first(kMaxKeptStates + 1);
  EXPECT_THAT(backend_->Step({&row, 1}, &out), IsOk());
}

TEST_F(CpuBackendTest, RefusesInnerSamplesThatDoNotFitTheTokens) {
  StepRow row;
  row.tokens = tokens_;
  std::vector<SamplingParams> inner(5);
  row.inner = inner;
  ExpectRefused(row, "5 inner samples for 5 tokens");
  row.inner = absl::MakeConstSpan(inner).first(4);
  inner[2].temperature = -1.0f;
  ExpectRefused(row, "temperature");
}

TEST_F(CpuBackendTest, RefusesStatesOfAnotherSize) {
  std::vector<float> state(179);
  const auto refused = StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("180 floats"));
  EXPECT_THAT(backend_->ReadSlot(0, absl::MakeSpan(state)), refused);
  EXPECT_THAT(backend_->WriteSlot(0, state), refused);
}

TEST_F(CpuBackendTest, RefusesBadTokens) {
  StepRow row;
  ExpectRefused(row, "row 0: no tokens");
  for (int32_t token : {-1, kVocab, std::numeric_limits<int32_t>::min()}) {
    const std::vector<int32_t> tokens = {1, token};
    row.tokens = tokens;
    ExpectRefused(row, "is out of range: the vocabulary has 131");
  }
  const std::vector<int32_t> many(kMaxTokens + 1, 1);
  row.tokens = many;
  ExpectRefused(row, "41 tokens in a step: at most 40");
}

TEST_F(CpuBackendTest, RefusesBadTargets) {
  StepRow row;
  row.tokens = tokens_;
  std::vector<int32_t> targets = {1, 2};
  row.targets = targets;
  ExpectRefused(row, "2 targets for 5 tokens");
  for (int32_t target : {-2, kVocab}) {
    targets.assign(5, target);
    row.targets = targets;
    ExpectRefused(row, "target");
  }
}

TEST_F(CpuBackendTest, RefusesBadSampling) {
  StepRow row;
  row.tokens = tokens_;
  SamplingParams sampling;
  row.sampling = &sampling;
  for (float temperature : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    sampling.temperature = temperature;
    ExpectRefused(row, "temperature");
  }
  sampling.temperature = 0.0f;
  std::vector<int32_t> banned(kMaxBannedTokens + 1, 3);
  sampling.banned = banned;
  ExpectRefused(row, "at most 64");
  banned = {kVocab};
  sampling.banned = banned;
  ExpectRefused(row, "banned token 131 is out of range");
}

TEST_F(CpuBackendTest, RefusesToBanEverything) {
  ModelConfig config = SmallConfig();
  config.vocab_size = 3;
  CpuBackendOptions options;
  options.threads = 1;
  backend_ = std::move(CreateCpuBackend(Model::Random(config, 1), options).value());
  const std::vector<int32_t> tokens = {0};
  const std::vector<int32_t> banned = {2, 0, 2, 1};
  SamplingParams sampling;
  sampling.banned = banned;
  StepRow row;
  row.tokens = tokens;
  row.sampling = &sampling;
  ExpectRefused(row, "the whole vocabulary is banned");
}

TEST(CreateCpuBackendTest, RefusesOptionsOutOfRange) {
  const std::shared_ptr<const Model> model = Model::Random(SmallConfig(), 3);
  const auto refused = [&](const CpuBackendOptions& options, const std::string& message) {
    EXPECT_THAT(CreateCpuBackend(model, options),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  CpuBackendOptions options;
  options.threads = -1;
  refused(options, "threads=-1");
  options = {};
  options.num_slots = 0;
  refused(options, "num_slots=0");
  options = {};
  options.max_step_tokens = 0;
  refused(options, "max_step_tokens=0");
  options = {};
  options.isa = "sse9";
  refused(options, "sse9");
}

// In a process of its own, of a user who may start no thread more: root's is not limited. 0 when
// the backend refuses and says so.
int ExitStatusWithoutThreads() {
  const std::shared_ptr<const Model> model = Model::Random(SmallConfig(), 3);
  const rlimit none = {1, 1};
  if (setrlimit(RLIMIT_NPROC, &none) != 0) return 2;
  if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) {
    fprintf(stderr, "not tested: there is no other user here\n");
    return 0;
  }
  CpuBackendOptions options;
  options.threads = 4;
  const absl::Status status = CreateCpuBackend(model, options).status();
  return absl::IsResourceExhausted(status) &&
                 absl::StrContains(status.message(), "cannot start 4 threads")
             ? 0
             : 1;
}

TEST(CreateCpuBackendTest, SaysWhenTheSystemStartsNoMoreThreads) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(_exit(ExitStatusWithoutThreads()), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace mmfree
