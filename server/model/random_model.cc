#include "server/model/random_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/internal/raw_logging.h"
#include "absl/strings/str_cat.h"
#include "server/base/numerics.h"
#include "server/model/layout.h"
#include "server/model/model.h"
#include "server/model/packed.h"
#include "server/model/parallel.h"
#include "server/model/region.h"
#include "server/model/sha256.h"
#include "server/model/stored_model.h"

namespace mmfree {
namespace {

// Bytes filled by one task; each chunk has its own generator, so threads do not change a bit.
constexpr int64_t kChunkBytes = int64_t{8} << 20;

// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
// word n is a function of n alone, so the loop has no dependency beyond an addition.
class Generator {
 public:
  explicit Generator(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // In [low, high).
  float Uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(Next() >> 40) * 0x1p-24f);
  }

 private:
  uint64_t state_;
};

uint64_t Mix(uint64_t seed, uint64_t a, uint64_t b) {
  return Generator(Generator(Generator(seed).Next() ^ a).Next() ^ b).Next();
}

// 32 codes: pairs of random bits, each 3 drawn again twice and then made 1, which gives a nonzero
// weight with probability 21/32.
uint64_t RandomCodes(Generator& random) {
  constexpr uint64_t kLowBits = 0x5555555555555555ull;
  uint64_t codes = random.Next();
  for (int again = 0; again < 2; ++again) {
    const uint64_t threes = codes & (codes >> 1) & kLowBits;
    const uint64_t mask = threes | (threes << 1);
    codes = (codes & ~mask) | (random.Next() & mask);
  }
  const uint64_t threes = codes & (codes >> 1) & kLowBits;
  return codes & ~(threes << 1);
}

// `bytes` is a multiple of 8.
void FillCodes(Generator random, uint8_t* out, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 8) {
    const uint64_t codes = RandomCodes(random);
    memcpy(out + k, &codes, sizeof(codes));
  }
}

// fp16 values with magnitude in [1/8, 1/2), four from each word; `bytes` is a multiple of 2.
void FillHalf(Generator random, uint8_t* out, int64_t bytes) {
  constexpr uint64_t kKeep = 0x87ff87ff87ff87ffull;  // signs, mantissas and the lowest exponent bit
  constexpr uint64_t kExponent = 0x3000300030003000ull;
  for (int64_t k = 0; k < bytes; k += 8) {
    const uint64_t halves = (random.Next() & kKeep) | kExponent;
    memcpy(out + k, &halves, static_cast<size_t>(std::min<int64_t>(8, bytes - k)));
  }
}

struct Chunk {
  size_t tensor;
  int64_t offset;  // in the tensor
  int64_t bytes;
};

// Everything but the hashes and the digest.
StoredModel::Parts RandomParts(const ModelConfig& config, uint64_t seed) {
  StoredModel::Parts parts;
  parts.config = config;
  parts.embedding_dtype = DType::kF16;
  parts.layout = MakePackedLayout(config, parts.embedding_dtype);
  absl::StatusOr<Region> region = Region::Allocate(parts.layout.bytes);
  if (!region.ok()) ABSL_RAW_LOG(FATAL, "%s", region.status().ToString().c_str());
  parts.region = *std::move(region);
  uint8_t* const base = parts.region.mutable_data();

  const std::vector<PackedTensor>& tensors = parts.layout.tensors;
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const PackedTensor& tensor = tensors[t];
    parts.data.push_back(base + tensor.offset);
    // Unit-variance inputs give unit-variance outputs.
    parts.scales.push_back(tensor.kind == PackedTensor::Kind::kTernary
                               ? 1.0f / std::sqrt(static_cast<float>(tensor.cols) * 21.0f / 32.0f)
                               : 0.0f);
    for (int64_t done = 0; done < tensor.bytes; done += kChunkBytes) {
      chunks.push_back({t, done, std::min(kChunkBytes, tensor.bytes - done)});
    }
  }
  ParallelFor(static_cast<int64_t>(chunks.size()), 0, [&](int64_t index) {
    const Chunk& chunk = chunks[index];
    const PackedTensor& tensor = tensors[chunk.tensor];
    uint8_t* const out = base + tensor.offset + chunk.offset;
    Generator random(Mix(seed, chunk.tensor, static_cast<uint64_t>(chunk.offset)));
    switch (tensor.kind) {
      case PackedTensor::Kind::kTernary:
        FillCodes(random, out, chunk.bytes);
        break;
      case PackedTensor::Kind::kEmbedding:
        FillHalf(random, out, chunk.bytes);
        break;
      case PackedTensor::Kind::kVector: {
        float* const values = reinterpret_cast<float*>(out);
        for (int64_t k = 0; k < tensor.cols; ++k) values[k] = random.Uniform(0.9f, 1.1f);
        break;
      }
    }
  });
  for (const PackedTensor& tensor : tensors) {
    uint8_t* const data = base + tensor.offset;
    if (tensor.kind == PackedTensor::Kind::kTernary) {
      ClearTernaryPadding(tensor.rows, tensor.cols, data);
    } else if (tensor.lower_bound_layer >= 0) {
      // Near n / L, as the cumulated softmax of a trained model is; the values are in [0.9, 1.1).
      const float fraction = config.use_lower_bound
                                 ? 0.9f * static_cast<float>(tensor.lower_bound_layer) /
                                       static_cast<float>(config.num_layers)
                                 : 0.0f;
      float* const bound = reinterpret_cast<float*>(data);
      for (int64_t k = 0; k < tensor.cols; ++k) bound[k] *= fraction;
    }
  }
  return parts;
}

}  // namespace

std::shared_ptr<const Model> Model::Random(const ModelConfig& config, uint64_t seed) {
  StoredModel::Parts parts = RandomParts(config, seed);
  // SHA-256 of what determines the weights: hashing gigabytes would take longer than making them.
  parts.digest =
      Sha256Hex(absl::StrCat("mmfree random model 1\n", config.vocab_size, " ", config.hidden_size,
                             " ", config.intermediate_size, " ", config.num_layers, " ",
                             FloatToBits(config.rms_norm_eps), " ", config.use_lower_bound ? 1 : 0,
                             " ", config.bos_token_id, " ", config.eos_token_id, " ", seed, "\n"));

  return std::make_shared<StoredModel>(std::move(parts));
}

std::shared_ptr<const StoredModel> HashedRandomModel(const ModelConfig& config, uint64_t seed) {
  StoredModel::Parts parts = RandomParts(config, seed);
  const std::vector<PackedTensor>& tensors = parts.layout.tensors;
  parts.sha256.resize(tensors.size());
  ParallelFor(static_cast<int64_t>(tensors.size()), 0, [&](int64_t t) {
    parts.sha256[t] =
        Sha256Hex(absl::MakeConstSpan(parts.data[t], static_cast<size_t>(tensors[t].bytes)));
  });
  parts.digest =
      ModelDigest(config, parts.embedding_dtype, parts.layout, parts.scales, parts.sha256);
  return std::make_shared<StoredModel>(std::move(parts));
}

}  // namespace mmfree
