// Any bytes as a safetensors file, and as a packed model of a small shape: the readers must return.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/model/config.h"
#include "server/model/layout.h"
#include "server/model/packed.h"
#include "server/model/safetensors.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/support/safetensors_writer.h"

namespace {

mmfree::ModelConfig SmallConfig() {
  mmfree::ModelConfig config;
  config.vocab_size = 3;
  config.hidden_size = 2;
  config.intermediate_size = 2;
  config.num_layers = 1;
  return config;
}

}  // namespace

std::vector<std::string> mmfree::FuzzSeeds() {
  SafetensorsWriter plain;
  plain.Add("a", "F16", {2, 2}, "12345678");
  plain.Add("b", "U8", {3}, "123");
  SafetensorsWriter packed = plain;
  packed.AddMetadata("mmfree_format", "1");
  return {plain.Finish(), packed.Finish()};
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  // As aligned as a mapping is, or no packed model would be accepted; and exactly as long, so that
  // one byte too far is seen.
  void* block = nullptr;
  if (posix_memalign(&block, mmfree::kTensorAlign, size) != 0) return 0;
  const std::unique_ptr<void, decltype(&std::free)> owner(block, &std::free);
  if (size > 0) memcpy(block, input, size);
  const uint8_t* const data = static_cast<const uint8_t*>(block);
  absl::StatusOr<mmfree::SafetensorsFile> file =
      mmfree::SafetensorsFile::Parse(absl::MakeConstSpan(data, size), "fuzz");
  if (!file.ok()) return 0;
  // What is accepted lies inside the input; reading it all lets the sanitizer say so.
  size_t sum = 0;
  for (const mmfree::TensorView& tensor : file->tensors()) {
    for (int64_t k = 0; k < tensor.bytes; ++k) sum += tensor.data[k];
  }
  static volatile size_t sink;
  sink = sum;
  (void)sink;
  if (mmfree::IsPacked(*file)) {
    mmfree::LoadOptions options;
    options.verify = true;
    options.threads = 1;
    const mmfree::ModelConfig config = SmallConfig();
    (void)mmfree::LoadPacked(config, *std::move(file), options);
  }
  return 0;
}
