// A small checkpoint in the published layout, made from a seed, for tests of whatever reads models.
#ifndef MMFREE_TESTS_SUPPORT_TINY_CHECKPOINT_H_
#define MMFREE_TESTS_SUPPORT_TINY_CHECKPOINT_H_

#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/model/config.h"
#include "tests/support/safetensors_writer.h"
#include "tests/support/temp_directory.h"

namespace mmfree {

struct TinyTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// Every value is a multiple of 1/64 in [-1, 1] (norms: in [1/2, 3/2)), so it is the same number in
// F32, F16 and BF16.
class TinyCheckpoint {
 public:
  // Sizes that are multiples of nothing, so that all padding is exercised.
  static ModelConfig OddConfig() {
    ModelConfig config;
    config.vocab_size = 37;
    config.hidden_size = 20;
    config.intermediate_size = 75;
    config.num_layers = 3;
    return config;
  }

  explicit TinyCheckpoint(const ModelConfig& config, uint32_t seed = 1) : config_(config) {
    std::mt19937 random(seed);
    const int64_t d = config.hidden_size;
    const int64_t f = config.intermediate_size;
    const int64_t v = config.vocab_size;
    json_ = {{"model_type", "hgrn_bit"},
             {"vocab_size", v},
             {"hidden_size", d},
             {"intermediate_size", f},
             {"num_hidden_layers", config.num_layers},
             {"hidden_act", "swish"},
             {"rms_norm_eps", 1e-6},
             {"use_lower_bound", config.use_lower_bound},
             {"bos_token_id", config.bos_token_id},
             {"eos_token_id", config.eos_token_id}};
    for (int64_t n = 0; n < config.num_layers; ++n) {
      const std::string layer = absl::StrCat("model.layers.", n, ".");
      for (const char* const name : {"attn.i_proj", "attn.f_proj", "attn.g_proj", "attn.o_proj"}) {
        Linear(random, layer + name, d, d);
      }
      Linear(random, layer + "mlp.gate_proj", 2 * f, d);
      Linear(random, layer + "mlp.down_proj", d, f);
      Norm(random, layer + "attn.g_norm.weight", d);
      Norm(random, layer + "attn_norm.weight", d);
      Norm(random, layer + "mlp_norm.weight", d);
    }
    Linear(random, "lm_head", v, d);
    Norm(random, "model.norm.weight", d);
    Matrix(random, "model.embeddings.weight", v, d);
    if (config.use_lower_bound) Matrix(random, "model.lower_bounds", config.num_layers, d);
  }

  const ModelConfig& config() const { return config_; }
  // config.json, and the tensors by name; change them to make a wrong checkpoint.
  nlohmann::json& json() { return json_; }
  std::map<std::string, TinyTensor>& tensors() { return tensors_; }

  // Writes the directory with weights of `dtype` ("F32", "F16" or "BF16") in `shards` files.
  void Write(const TempDirectory& directory, const std::string& dtype, int shards = 1) const {
    WriteFile(directory.File("config.json"), json_.dump(1));
    WriteFile(directory.File("tokenizer.model"), "not a real tokenizer");
    std::vector<SafetensorsWriter> files(static_cast<size_t>(shards));
    nlohmann::json map = nlohmann::json::object();
    size_t next = 0;
    for (const auto& [name, tensor] : tensors_) {
      const size_t shard = next++ % files.size();
      files[shard].Add(name, dtype, tensor.shape, Encode(dtype, tensor.values));
      map[name] = ShardName(shard, files.size());
    }
    for (size_t shard = 0; shard < files.size(); ++shard) {
      files[shard].AddMetadata("format", "pt");
      WriteFile(directory.File(ShardName(shard, files.size())), files[shard].Finish());
    }
    if (shards > 1) {
      WriteFile(
          directory.File("model.safetensors.index.json"),
          nlohmann::json({{"metadata", nlohmann::json::object()}, {"weight_map", map}}).dump());
    }
  }

  // Values that are exact in `dtype` as its bytes.
  static std::string Encode(const std::string& dtype, const std::vector<float>& values) {
    std::string bytes;
    for (const float value : values) {
      uint32_t bits;
      memcpy(&bits, &value, sizeof(bits));
      if (dtype == "F32") {
        Append(&bytes, bits, 4);
      } else if (dtype == "BF16") {
        Append(&bytes, bits >> 16, 2);
      } else {
        // Normal numbers and zero only; an exponent of all ones stays one.
        const uint32_t sign = bits >> 16 & 0x8000u;
        const uint32_t magnitude = bits & 0x7fffffffu;
        uint32_t half = 0;
        if (magnitude >= 0x7f800000u) {
          half = 0x7c00u | (magnitude >> 13 & 0x3ffu);
        } else if (magnitude != 0) {
          half = (magnitude >> 13) - (112u << 10);
        }
        Append(&bytes, sign | half, 2);
      }
    }
    return bytes;
  }

 private:
  static void Append(std::string* out, uint32_t value, int bytes) {
    for (int k = 0; k < bytes; ++k) out->push_back(static_cast<char>(value >> (8 * k) & 0xff));
  }
  static std::string ShardName(size_t shard, size_t shards) {
    if (shards == 1) return "model.safetensors";
    return absl::StrCat("model-0000", shard + 1, "-of-0000", shards, ".safetensors");
  }
  void Linear(std::mt19937& random, const std::string& name, int64_t rows, int64_t cols) {
    Matrix(random, name + ".weight", rows, cols);
    Norm(random, name + ".norm.weight", cols);
  }
  void Matrix(std::mt19937& random, const std::string& name, int64_t rows, int64_t cols) {
    TinyTensor tensor{{rows, cols}, {}};
    for (int64_t k = 0; k < rows * cols; ++k) {
      tensor.values.push_back(static_cast<float>(static_cast<int>(random() % 129) - 64) / 64.0f);
    }
    tensors_[name] = std::move(tensor);
  }
  void Norm(std::mt19937& random, const std::string& name, int64_t size) {
    TinyTensor tensor{{size}, {}};
    for (int64_t k = 0; k < size; ++k) {
      tensor.values.push_back(static_cast<float>(32 + static_cast<int>(random() % 64)) / 64.0f);
    }
    tensors_[name] = std::move(tensor);
  }

  ModelConfig config_;
  nlohmann::json json_;
  std::map<std::string, TinyTensor> tensors_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_TINY_CHECKPOINT_H_
