// The CUDA backend and a CPU backend over one model, driven with the same calls: every output and
// every state must be the same bytes.
#ifndef MMFREE_TESTS_GPU_BACKEND_PAIR_H_
#define MMFREE_TESTS_GPU_BACKEND_PAIR_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/backends/cuda/cuda_backend.h"
#include "server/model/model.h"
#include "tests/gpu/skip_without_gpu.h"

namespace mmfree {

// Directory of the source tree at run time: MMFREE_TEST_DATA when set, so that the programs can run
// on another machine than they were built on.
std::string TestDataDirectory();

class BackendPair {
 public:
  struct Options {
    int32_t num_slots = 8;
    int32_t max_step_tokens = 256;
    CudaBackendOptions::Kernels kernels = CudaBackendOptions::Kernels::kAuto;
    bool use_graphs = true;
    std::string cpu_isa = "scalar";
  };

  static absl::StatusOr<BackendPair> Create(std::shared_ptr<const Model> model,
                                            const Options& options);

  Backend& cpu() { return *cpu_; }
  Backend& cuda() { return *cuda_; }
  const Model& model() const { return *model_; }

  // Runs the step on both and expects equal bytes. `what` names it in failures. Returns the output.
  StepOutput Step(absl::Span<const StepRow> rows, const std::string& what);
  // Takes a slot of both back.
  void Rewind(int32_t slot, int32_t tokens, const std::string& what);
  // Expects the states of a slot to be equal.
  void ExpectEqualState(int32_t slot, const std::string& what);

 private:
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> cpu_;
  std::unique_ptr<Backend> cuda_;
};

// Owns what the spans of random step rows refer to.
class RowMaker {
 public:
  RowMaker(const ModelConfig& config, uint64_t seed) : config_(config), random_(seed) {}

  // Forgets the rows made before.
  void Clear();
  // A row of `count` random tokens with random sampling parameters, banned ids and, when `scored`,
  // targets.
  StepRow Make(int32_t slot, int32_t count, LogitsMode logits, bool scored);
  // The same that also samples after each of its tokens, with other parameters at each.
  StepRow MakeInner(int32_t slot, int32_t count, bool scored);
  int32_t Uniform(int32_t low, int32_t high);  // both included

 private:
  struct Storage {
    std::vector<int32_t> tokens;
    std::vector<int32_t> targets;
    std::vector<SamplingParams> sampling;  // of the row's last token, or of each
    std::vector<std::vector<int32_t>> banned;
  };

  void AddSampling(Storage* storage);

  const ModelConfig config_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Storage>> storage_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_GPU_BACKEND_PAIR_H_
