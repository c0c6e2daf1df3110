// The device makes the draws of DrawToken: every option, over logits and vocabularies of every
// kind, bit for bit.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/device.h"
#include "server/backends/cuda/device_draws.h"
#include "server/backends/cuda/kernels.h"
#include "server/base/status_macros.h"
#include "server/sampling/request_sampler.h"
#include "tests/gpu/backend_pair.h"
#include "tests/support/random_draws.h"

namespace mmfree::cuda {
namespace {

constexpr int32_t kMaxRows = 64;

// The end of a step: logits that are given, the device's samples of them and its draws.
class DrawRunner {
 public:
  static absl::StatusOr<std::unique_ptr<DrawRunner>> Create(int32_t vocab) {
    std::unique_ptr<DrawRunner> runner(new DrawRunner(vocab));
    MMFREE_RETURN_IF_ERROR(runner->Initialize());
    return runner;
  }

  // Places the draws on heads with others between them and makes them.
  absl::Status Run(const std::vector<std::unique_ptr<RandomDraw>>& draws,
                   std::vector<SampledToken>* out, int* made_by_host) {
    const int32_t rows = 2 * static_cast<int32_t>(draws.size());
    host_.counts->heads = rows;
    for (int32_t n = 0; n < rows; ++n) {
      host_.heads[n] = {};
      host_.heads[n].temperature = -1.0f;
      host_.heads[n].target = -1;
      MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(logits_ + n * ld_, draws[n / 2]->logits.data(),
                                                  vocab_ * sizeof(float), cudaMemcpyHostToDevice,
                                                  stream_.get()));
    }
    draws_->Begin();
    std::vector<bool> on_device;
    for (size_t i = 0; i < draws.size(); ++i) {
      on_device.push_back(
          draws_->Add(static_cast<int32_t>(2 * i + 1), draws[i]->params, draws[i]->position));
    }
    MMFREE_RETURN_IF_ERROR(draws_->Upload());
    // In two parts, as steps with many heads are.
    for (const auto& [first, count] : {std::pair(0, rows / 2), {rows / 2, rows - rows / 2}}) {
      if (count == 0) continue;
      MMFREE_CUDA_RETURN_IF_ERROR(LaunchSample(logits_ + first * ld_, ld_, vocab_, host_, first,
                                               count, stats_, head_out_, context_));
      MMFREE_RETURN_IF_ERROR(draws_->Launch(logits_ + first * ld_, ld_, stats_, first, count));
    }
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    int32_t next = 0;
    for (size_t i = 0; i < draws.size(); ++i) {
      if (on_device[i]) {
        out->push_back(draws_->Result(next++));
      } else {
        out->push_back(draws[i]->Sample(draws[i]->logits, draws[i]->params, draws[i]->position));
        ++*made_by_host;
      }
    }
    return absl::OkStatus();
  }

 private:
  explicit DrawRunner(int32_t vocab) : vocab_(vocab), ld_(RoundUp(vocab, 4)) {}

  absl::Status Initialize() {
    MMFREE_ASSIGN_OR_RETURN(const DeviceInfo device, OpenDevice(0));
    cudaStream_t stream = nullptr;
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    stream_ = Stream(stream);
    context_.stream = stream;
    context_.overlap = device.compute_capability >= 90;
    context_.num_sms = device.num_sms;
    context_.shared_bytes_per_block = device.shared_bytes_per_block;
    MMFREE_ASSIGN_OR_RETURN(
        memory_, DeviceBuffer::Allocate(2 * kMaxRows * (ld_ * sizeof(float) + sizeof(HeadStats))));
    logits_ = reinterpret_cast<float*>(memory_.data());
    stats_ = reinterpret_cast<HeadStats*>(memory_.data() + 2 * kMaxRows * ld_ * sizeof(float));
    const auto bind = [this](std::byte* base) {
      Carver carver(base);
      host_.counts = carver.Take<StepCounts>(1);
      host_.heads = carver.Take<HeadInput>(2 * kMaxRows);
      host_.banned = carver.Take<int32_t>(1);
      head_out_ = carver.Take<HeadOutput>(2 * kMaxRows);
      return carver.bytes();
    };
    MMFREE_ASSIGN_OR_RETURN(pinned_, PinnedBuffer::Allocate(bind(nullptr)));
    bind(pinned_.data());
    MMFREE_ASSIGN_OR_RETURN(DeviceDraws draws,
                            DeviceDraws::Create({vocab_, kMaxRows, 2 * kMaxRows}, context_));
    draws_ = std::make_unique<DeviceDraws>(std::move(draws));
    return absl::OkStatus();
  }

  const int32_t vocab_;
  const int64_t ld_;
  Stream stream_;
  LaunchContext context_;
  DeviceBuffer memory_;
  float* logits_ = nullptr;
  HeadStats* stats_ = nullptr;
  PinnedBuffer pinned_;
  StepInputs host_ = {};
  HeadOutput* head_out_ = nullptr;
  std::unique_ptr<DeviceDraws> draws_;
};

struct Subject {
  int32_t vocab;
  int rounds;
};

class DrawTest : public testing::TestWithParam<Subject> {};

TEST_P(DrawTest, AreThoseOfTheHost) {
  MMFREE_SKIP_WITHOUT_GPU();
  const auto [vocab, rounds] = GetParam();
  absl::StatusOr<std::unique_ptr<DrawRunner>> runner = DrawRunner::Create(vocab);
  ASSERT_TRUE(runner.ok()) << runner.status();
  RandomDraws random(static_cast<uint64_t>(vocab));
  int made_by_host = 0;
  int failures = 0;
  int count = 0;
  for (int round = 0; round < rounds && failures < 5; ++round) {
    std::vector<std::unique_ptr<RandomDraw>> draws;
    for (int32_t i = round == 0 ? 1 : kMaxRows; i > 0; --i) draws.push_back(random.Make(vocab));
    std::vector<SampledToken> out;
    const absl::Status status = (*runner)->Run(draws, &out, &made_by_host);
    ASSERT_TRUE(status.ok()) << status;
    count += static_cast<int>(draws.size());
    for (size_t i = 0; i < draws.size() && failures < 5; ++i) {
      const RandomDraw& draw = *draws[i];
      const SampledToken expected = DrawToken(draw.draw, draw.logits, draw.params, draw.position);
      if (SameDraw(expected, out[i])) continue;
      ++failures;
      ADD_FAILURE() << draw.Name() << "\nhost   " << ToString(expected) << "\ndevice "
                    << ToString(out[i]);
    }
  }
  EXPECT_LT(made_by_host, count / 20 + 1) << "of " << count;
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, DrawTest,
                         testing::Values(Subject{1, 5}, Subject{2, 10}, Subject{3, 10},
                                         Subject{31, 10}, Subject{32, 10}, Subject{33, 10},
                                         Subject{64, 10}, Subject{65, 10}, Subject{513, 30},
                                         Subject{1000, 30}, Subject{1025, 10}, Subject{4096, 20},
                                         Subject{32000, 24}, Subject{32001, 6}, Subject{50257, 4},
                                         Subject{128256, 4}),
                         [](const auto& info) { return std::to_string(info.param.vocab); });

TEST(MaskCacheTest, PlacesOfAStepStayAndTheRestIsReused) {
  MaskCache cache(4);
  std::vector<std::shared_ptr<const TokenMask>> masks;
  for (int i = 0; i < 8; ++i) masks.push_back(std::make_shared<const TokenMask>(64, true));
  cache.BeginStep();
  std::vector<int32_t> places;
  for (int i = 0; i < 4; ++i) {
    const MaskCache::Found found = cache.Find(masks[i], true);
    EXPECT_TRUE(found.is_new);
    places.push_back(found.place);
  }
  for (int i = 0; i < 4; ++i) {
    const MaskCache::Found found = cache.Find(masks[i], true);
    EXPECT_FALSE(found.is_new);
    EXPECT_EQ(found.place, places[i]);
    for (int j = 0; j < i; ++j) EXPECT_NE(places[i], places[j]);
  }
  EXPECT_EQ(cache.Find(masks[4], true).place, MaskCache::kFull);  // all are in use

  // What each step uses stays; the others take turns in what is left.
  for (int step = 0; step < 20; ++step) {
    cache.BeginStep();
    std::vector<int32_t> in_use = {cache.Find(masks[0], false).place};
    EXPECT_EQ(in_use[0], places[0]) << step;
    for (int i = 0; i < 3; ++i) {
      const int32_t place = cache.Find(masks[1 + (3 * step + i) % 7], true).place;
      EXPECT_NE(place, MaskCache::kFull);
      for (const int32_t other : in_use) EXPECT_NE(place, other);
      in_use.push_back(place);
    }
    EXPECT_EQ(cache.Find(std::make_shared<const TokenMask>(64, true), true).place,
              MaskCache::kFull);
  }
  cache.BeginStep();
  EXPECT_EQ(cache.Find(std::make_shared<const TokenMask>(64, true), false).place, MaskCache::kFull);
}

}  // namespace
}  // namespace mmfree::cuda
