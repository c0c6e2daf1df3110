// Times the products of the published shapes by themselves, for every tile shape of the wgmma
// kernel and a range of token counts: what its choice of tiles is made from.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/layout.h"
#include "server/model/config.h"

namespace mmfree::cuda {
namespace {

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  exit(1);
}

struct Product {
  std::string name;
  int64_t rows;
  int64_t cols;
  int32_t matrices;
  Epilogue epilogue;
};

// Copies of the weights in rotation, so that they come from memory.
constexpr int kCopies = 6;
constexpr int kRepeats = 4;
constexpr int32_t kMaxTokens = 2048;

class ProductBench {
 public:
  explicit ProductBench(int32_t num_sms) {
    context_.num_sms = num_sms;
    context_.hopper = true;
    context_.overlap = true;
    Check(cudaStreamCreate(&context_.stream));
    Check(cudaEventCreate(&start_));
    Check(cudaEventCreate(&stop_));
  }

  void Run(const Product& product, const std::vector<int32_t>& batches) {
    GemmArgs args;
    args.epilogue = product.epilogue;
    args.weights.matrices = product.matrices;
    args.weights.row_blocks = static_cast<int32_t>(CeilDiv(product.rows, kRowBlock));
    args.weights.k_blocks = static_cast<int32_t>(CeilDiv(product.cols, kColumnBlock));
    args.weights.scale[0] = args.weights.scale[1] = args.weights.scale[2] = 0.01f;
    const int64_t weight_bytes =
        int64_t{product.matrices} * args.weights.row_blocks * args.weights.k_blocks * kBlockBytes;
    const int64_t q_bytes =
        (int64_t{product.matrices} * args.weights.k_blocks * kMaxTokens + kRowSlack) * kColumnBlock;
    args.ld = product.epilogue == Epilogue::kSwiGlu ? product.rows / 2 : product.rows;
    uint8_t* weights = Allocate(weight_bytes * kCopies);
    args.q = reinterpret_cast<const int8_t*>(Allocate(q_bytes));
    args.meta = Metas(int64_t{product.matrices} * kMaxTokens + kRowSlack, product.cols);
    args.out = reinterpret_cast<float*>(
        Allocate(int64_t{product.matrices} * kMaxTokens * args.ld * sizeof(float), 0));
    for (const int32_t batch : batches) {
      args.max_tokens = batch;
      args.stride = static_cast<int32_t>(RoundUp(batch, 8));
      args.matrix_stride = batch * args.ld;
      printf("%-12s M=%-5d", product.name.c_str(), batch);
      for (args.tile = -1; args.tile < kNumWgmmaTiles; ++args.tile) {
        float best = 1e30f;
        for (int repeat = 0; repeat < kRepeats; ++repeat) {
          Check(cudaEventRecord(start_, context_.stream));
          for (int copy = 0; copy < kCopies; ++copy) {
            args.weights.codes = weights + copy * weight_bytes;
            Check(LaunchGemmWgmma(args, context_));
          }
          Check(cudaEventRecord(stop_, context_.stream));
          Check(cudaEventSynchronize(stop_));
          float ms = 0;
          Check(cudaEventElapsedTime(&ms, start_, stop_));
          if (repeat > 0 && ms < best) best = ms;
        }
        printf(args.tile < 0 ? " est %6.1f |" : " %6.1f", best * 1000 / kCopies);
      }
      printf("\n");
    }
    for (void* pointer : allocated_) Check(cudaFree(pointer));
    allocated_.clear();
  }

 private:
  // Such that values are about one: divisions of zeros take a slower path than those of a model.
  const RowMeta* Metas(int64_t count, int64_t cols) {
    const RowMeta meta = {1.0f / static_cast<float>(cols), 0};
    const std::vector<RowMeta> metas(count, meta);
    uint8_t* const at = Allocate(count * sizeof(RowMeta));
    Check(cudaMemcpy(at, metas.data(), count * sizeof(RowMeta), cudaMemcpyHostToDevice));
    return reinterpret_cast<const RowMeta*>(at);
  }

  uint8_t* Allocate(int64_t bytes, int value = 0x51) {
    void* pointer = nullptr;
    Check(cudaMalloc(&pointer, bytes));
    Check(cudaMemset(pointer, value, bytes));
    allocated_.push_back(pointer);
    return static_cast<uint8_t*>(pointer);
  }

  LaunchContext context_;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
  std::vector<void*> allocated_;
};

int Main() {
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0));
  ProductBench bench(properties.multiProcessorCount);
  printf("us a launch, by tile shape (gemm_wgmma.cu)\n");
  for (const std::string shape : {"370m", "1.3b", "2.7b", "13b"}) {
    const ModelConfig config = *ConfigForShape(shape);
    const int64_t dim = config.hidden_size;
    const int64_t channels = config.intermediate_size;
    const std::vector<int32_t> batches = {16, 32, 64, 128, 256, 512, 1024, 2048};
    bench.Run({shape + " ifg", dim, dim, 3, Epilogue::kStore}, batches);
    bench.Run({shape + " o", dim, dim, 1, Epilogue::kResidual}, batches);
    bench.Run({shape + " gate", 2 * channels, dim, 1, Epilogue::kSwiGlu}, batches);
    bench.Run({shape + " down", dim, channels, 1, Epilogue::kResidual}, batches);
    bench.Run({shape + " head", config.vocab_size, dim, 1, Epilogue::kStore},
              {16, 64, 128, 256, 512, 1024});
  }
  return 0;
}

}  // namespace
}  // namespace mmfree::cuda

int main() { return mmfree::cuda::Main(); }
