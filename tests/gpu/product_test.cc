// Every tile shape of the wgmma products gives the bytes of the mma.sync kernel, whether a shape
// and a number of tokens would choose it or not: tails of rows and tokens, fewer columns than the
// ring has stages and more, any number of tiles a block, launches that overlap.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/backends/cuda/device.h"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/layout.h"
#include "server/base/numerics.h"
#include "server/base/status_macros.h"
#include "tests/gpu/skip_without_gpu.h"

namespace mmfree::cuda {
namespace {

struct Shape {
  std::string name;
  Epilogue epilogue;
  int32_t matrices;
  int32_t row_blocks;
  int32_t k_blocks;
  std::vector<int32_t> tokens;
  // Multiprocessors that the launch counts on: the fewer, the more tiles a block takes in turn. 0:
  // those of the device.
  std::vector<int32_t> num_sms = {0};
};

template <typename T>
absl::StatusOr<DeviceBuffer> Upload(const std::vector<T>& values) {
  MMFREE_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Allocate(values.size() * sizeof(T)));
  MMFREE_CUDA_RETURN_IF_ERROR(
      cudaMemcpy(buffer.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

// A product of random codes and weights, with an output that is not zero before it.
class RandomProduct {
 public:
  static absl::StatusOr<RandomProduct> Create(const Shape& shape, int32_t tokens) {
    std::mt19937 random(static_cast<uint32_t>(tokens) * 31 + shape.row_blocks);
    RandomProduct product;
    GemmArgs& args = product.args_;
    args.epilogue = shape.epilogue;
    args.max_tokens = tokens;
    args.stride = static_cast<int32_t>(RoundUp(tokens, 8));
    args.weights.matrices = shape.matrices;
    args.weights.row_blocks = shape.row_blocks;
    args.weights.k_blocks = shape.k_blocks;
    for (float& scale : args.weights.scale)
      scale = 0.01f + 0.001f * static_cast<float>(random() % 9);
    // The last rows of the last block are not there.
    const int64_t slots = int64_t{shape.row_blocks} * kRowBlock;
    args.ld = (shape.epilogue == Epilogue::kSwiGlu ? slots / 2 : slots) - 6;
    args.matrix_stride = tokens * args.ld;

    std::vector<uint8_t> codes(int64_t{shape.matrices} * shape.row_blocks * shape.k_blocks *
                               kBlockBytes);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
    std::vector<int8_t> q((int64_t{shape.matrices} * shape.k_blocks * args.stride + kRowSlack) *
                          kColumnBlock);
    for (int8_t& value : q) value = static_cast<int8_t>(static_cast<int32_t>(random() % 255) - 127);
    std::vector<RowMeta> meta(shape.matrices * args.stride + kRowSlack);
    for (RowMeta& row : meta) {
      row.out = 1e-3f * static_cast<float>(1 + random() % 1000);
      row.code_sum = static_cast<int32_t>(random() % 20001) - 10000;
    }
    product.before_.resize(shape.matrices * args.matrix_stride);
    for (float& value : product.before_) value = static_cast<float>(random() % 1000) - 500.0f;

    MMFREE_ASSIGN_OR_RETURN(product.codes_, Upload(codes));
    MMFREE_ASSIGN_OR_RETURN(product.q_, Upload(q));
    MMFREE_ASSIGN_OR_RETURN(product.meta_, Upload(meta));
    MMFREE_ASSIGN_OR_RETURN(product.out_, Upload(product.before_));
    args.weights.codes = reinterpret_cast<const uint8_t*>(product.codes_.data());
    args.q = reinterpret_cast<const int8_t*>(product.q_.data());
    args.meta = reinterpret_cast<const RowMeta*>(product.meta_.data());
    args.out = reinterpret_cast<float*>(product.out_.data());
    return product;
  }

  // The whole output after two launches, one after the other, with the tile shape `tile`. With
  // residuals the second one adds to what the first one wrote.
  absl::StatusOr<std::vector<float>> Run(cudaError_t (*launch)(const GemmArgs&,
                                                               const LaunchContext&),
                                         int32_t tile, const LaunchContext& context) {
    MMFREE_CUDA_RETURN_IF_ERROR(cudaMemcpy(args_.out, before_.data(),
                                           before_.size() * sizeof(float), cudaMemcpyHostToDevice));
    args_.tile = tile;
    MMFREE_CUDA_RETURN_IF_ERROR(launch(args_, context));
    MMFREE_CUDA_RETURN_IF_ERROR(launch(args_, context));
    MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context.stream));
    std::vector<float> out(before_.size());
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaMemcpy(out.data(), args_.out, out.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return out;
  }

  const std::vector<float>& before() const { return before_; }

 private:
  GemmArgs args_;
  DeviceBuffer codes_;
  DeviceBuffer q_;
  DeviceBuffer meta_;
  DeviceBuffer out_;
  std::vector<float> before_;
};

class ProductTest : public testing::TestWithParam<Shape> {};

TEST_P(ProductTest, EveryTileGivesTheBytesOfTheGenericKernel) {
  MMFREE_SKIP_WITHOUT_GPU();
  const absl::StatusOr<DeviceInfo> device = OpenDevice(0);
  ASSERT_TRUE(device.ok()) << device.status();
  if (!device->hopper) GTEST_SKIP() << "no wgmma on this device";
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  const Stream owner(stream);
  LaunchContext context;
  context.stream = stream;
  context.num_sms = device->num_sms;
  context.shared_bytes_per_block = device->shared_bytes_per_block;
  context.hopper = true;
  context.overlap = true;
  for (const int32_t tokens : GetParam().tokens) {
    absl::StatusOr<RandomProduct> product = RandomProduct::Create(GetParam(), tokens);
    ASSERT_TRUE(product.ok()) << product.status();
    const absl::StatusOr<std::vector<float>> expected = product->Run(LaunchGemmMma, -1, context);
    ASSERT_TRUE(expected.ok()) << expected.status();
    ASSERT_NE(*expected, product->before());
    for (const int32_t num_sms : GetParam().num_sms) {
      LaunchContext narrow = context;
      if (num_sms > 0) narrow.num_sms = num_sms;
      for (int32_t tile = -1; tile < kNumWgmmaTiles; ++tile) {
        const absl::StatusOr<std::vector<float>> out = product->Run(LaunchGemmWgmma, tile, narrow);
        ASSERT_TRUE(out.ok()) << out.status();
        const auto [at, other] =
            std::mismatch(out->begin(), out->end(), expected->begin(),
                          [](float a, float b) { return FloatToBits(a) == FloatToBits(b); });
        ASSERT_TRUE(at == out->end()) << "tile " << tile << ", " << tokens << " tokens, "
                                      << narrow.num_sms << " multiprocessors: element "
                                      << at - out->begin() << " is " << *at << ", not " << *other;
      }
    }
  }
}

std::vector<Shape> Shapes() {
  const std::vector<int32_t> tokens = {1, 8, 17, 64, 129, 161, 330};
  return {
      {"Store", Epilogue::kStore, 3, 5, 3, tokens},
      {"Residual", Epilogue::kResidual, 1, 7, 13, tokens},
      {"SwiGlu", Epilogue::kSwiGlu, 1, 6, 1, tokens},
      {"DeepResidual", Epilogue::kResidual, 1, 3, 54, {3, 100}},
      // Many tiles a block for those shapes whose blocks take several: a column block, or fewer
      // than the ring has stages, as many, more, and twice as many and more.
      {"OneColumnBlock", Epilogue::kStore, 1, 5, 1, {700}, {1}},
      {"TwoColumnBlocks", Epilogue::kSwiGlu, 1, 6, 2, {700}, {1, 2}},
      {"HalfARing", Epilogue::kResidual, 1, 3, 5, {330}, {1, 5}},
      {"ARing", Epilogue::kSwiGlu, 1, 6, 10, {330}, {1, 2}},
      {"EightColumnBlocks", Epilogue::kResidual, 1, 5, 8, {330}, {1, 5}},
      {"MoreThanARing", Epilogue::kStore, 3, 5, 11, {330}, {1, 5}},
      {"SixteenColumnBlocks", Epilogue::kStore, 1, 5, 16, {330}, {1, 5}},
      {"TwoRings", Epilogue::kSwiGlu, 1, 6, 20, {330}, {1, 2}},
      {"MoreThanTwoRings", Epilogue::kResidual, 1, 7, 21, {330}, {1, 2}},
      {"OneRowBlock", Epilogue::kSwiGlu, 1, 1, 13, {129, 257}, {1, 2}},
      {"Down", Epilogue::kResidual, 1, 40, 54, {1000}},
      {"TilesInTurn", Epilogue::kStore, 1, 261, 3, {330}},
      {"TilesInTurnSwiGlu", Epilogue::kSwiGlu, 1, 262, 10, {330}},
      {"TilesInTurnResidual", Epilogue::kResidual, 1, 263, 9, {700}},
  };
}

INSTANTIATE_TEST_SUITE_P(Shapes, ProductTest, testing::ValuesIn(Shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mmfree::cuda
