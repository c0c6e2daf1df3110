// States at rest on the device: the same bytes after every way in and out, while steps run.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/backend_pair.h"

namespace mmfree {
namespace {

constexpr int32_t kSlots = 4;
constexpr int32_t kResident = 64;

class ResidentTest : public testing::Test {
 protected:
  void SetUp() override {
    MMFREE_SKIP_WITHOUT_GPU();
    ModelConfig config;
    config.vocab_size = 64;
    config.hidden_size = 512;
    config.intermediate_size = 768;
    config.num_layers = 4;
    CudaBackendOptions options;
    options.num_slots = kSlots;
    options.resident_slots = kResident;
    options.max_step_tokens = 64;
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        CreateCudaBackend(*Model::Random(config, 1), options);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  std::vector<float> State() const { return std::vector<float>(backend_->info().state_floats); }
  std::vector<float> ReadSlot(int32_t slot) {
    std::vector<float> state = State();
    EXPECT_TRUE(backend_->ReadSlot(slot, absl::MakeSpan(state)).ok());
    return state;
  }
  std::vector<float> ReadResident(int32_t slot) {
    std::vector<float> state = State();
    const absl::Status read = backend_->ReadResident(slot, absl::MakeSpan(state));
    EXPECT_TRUE(read.ok()) << read;
    return state;
  }
  // One more token in a slot.
  void Feed(int32_t slot, int32_t token) {
    StepRow row;
    row.slot = slot;
    row.tokens = absl::MakeConstSpan(&token, 1);
    const absl::Status step = backend_->Step({row}, &out_);
    ASSERT_TRUE(step.ok()) << step;
  }

  std::unique_ptr<Backend> backend_;
  StepOutput out_;
};

TEST_F(ResidentTest, CopiesAreTheStateOfTheirTime) {
  std::vector<std::vector<float>> states;
  for (int32_t i = 0; i < kResident; ++i) {
    Feed(i % kSlots, i % 64);
    states.push_back(ReadSlot(i % kSlots));
    ASSERT_TRUE(backend_->CopySlot(i % kSlots, kSlots + i).ok());
    Feed(i % kSlots, 5);
  }
  for (int32_t i = kResident; i-- > 0;) {
    EXPECT_EQ(ReadResident(kSlots + i), states[i]) << i;
    ASSERT_TRUE(backend_->CopySlot(kSlots + i, i % kSlots).ok());
    EXPECT_EQ(ReadSlot(i % kSlots), states[i]) << i;
  }
}

TEST_F(ResidentTest, OneThatWentOnFromTheDeviceIsAsOneThatNeverLeft) {
  for (int32_t token = 0; token < 40; ++token) {
    Feed(0, token);
    Feed(1, token);
    ASSERT_TRUE(backend_->CopySlot(1, kSlots + token % 7).ok());
    ASSERT_TRUE(backend_->ZeroSlot(1).ok());
    ASSERT_TRUE(backend_->CopySlot(kSlots + token % 7, 1).ok());
  }
  EXPECT_EQ(ReadSlot(1), ReadSlot(0));
}

// More threads than lanes read while the slots that they do not read are stepped and copied to.
TEST_F(ResidentTest, ReadsBesideSteps) {
  constexpr int32_t kReaders = 8;
  std::vector<std::vector<float>> states;
  for (int32_t i = 0; i < kReaders; ++i) {
    Feed(0, i);
    states.push_back(ReadSlot(0));
    ASSERT_TRUE(backend_->CopySlot(0, kSlots + i).ok());
  }
  std::atomic<bool> wrong{false};
  std::vector<std::thread> readers;
  for (int32_t i = 0; i < kReaders; ++i) {
    readers.emplace_back([&, i] {
      std::vector<float> state = State();
      for (int round = 0; round < 50; ++round) {
        const absl::Status read = backend_->ReadResident(kSlots + i, absl::MakeSpan(state));
        if (!read.ok() || state != states[i]) wrong = true;
      }
    });
  }
  for (int32_t step = 0; step < 200; ++step) {
    Feed(step % kSlots, step % 64);
    ASSERT_TRUE(backend_->CopySlot(step % kSlots, kSlots + kReaders + step % 16).ok());
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_FALSE(wrong);
}

TEST_F(ResidentTest, RowsAndPlainReadsDoNotGetAtThemAndBoundsAreChecked) {
  std::vector<float> state = State();
  const auto refused = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  };
  refused(backend_->ReadSlot(kSlots, absl::MakeSpan(state)));
  refused(backend_->WriteSlot(kSlots, state));
  refused(backend_->ZeroSlot(kSlots));
  refused(backend_->CopySlot(0, kSlots + kResident));
  refused(backend_->CopySlot(kSlots + kResident, 0));
  refused(backend_->ReadResident(kSlots - 1, absl::MakeSpan(state)));
  refused(backend_->ReadResident(kSlots + kResident, absl::MakeSpan(state)));
  refused(backend_->ReadResident(kSlots, absl::MakeSpan(state).first(3)));
  const int32_t token = 1;
  StepRow row;
  row.slot = kSlots;
  row.tokens = absl::MakeConstSpan(&token, 1);
  refused(backend_->Step({row}, &out_));
}

}  // namespace
}  // namespace mmfree
