// A loaded model: configuration and weights, ready for a backend to read in place or upload.
#ifndef MMFREE_SERVER_MODEL_MODEL_H_
#define MMFREE_SERVER_MODEL_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/model/config.h"
#include "server/model/ternary.h"

namespace mmfree {

enum class DType : uint8_t { kF32, kF16, kBF16 };

// Token embeddings [vocab_size, hidden_size] in their published dtype; each converts exactly to
// fp32.
struct Embedding {
  DType dtype = DType::kF32;
  const void* data = nullptr;  // 64-byte aligned
};

// Views of fp32 vectors are 64-byte aligned. D hidden_size, F intermediate_size.
struct LayerWeights {
  absl::Span<const float> attn_norm;    // [D]
  absl::Span<const float> i_norm;       // [D] i_proj.norm
  absl::Span<const float> f_norm;       // [D] f_proj.norm
  absl::Span<const float> g_norm_in;    // [D] g_proj.norm
  absl::Span<const float> g_norm;       // [D] norm of g_proj's output
  absl::Span<const float> o_norm;       // [D] o_proj.norm
  absl::Span<const float> mlp_norm;     // [D]
  absl::Span<const float> gate_norm;    // [D] mlp.gate_proj.norm
  absl::Span<const float> down_norm;    // [F] mlp.down_proj.norm
  absl::Span<const float> lower_bound;  // [D] lb_n, zeros for layer 0
  TernaryMatrix i, f, g, o;             // [D, D]
  TernaryMatrix gate;                   // [2F, D]: rows [0, F) are p, rows [F, 2F) are r
  TernaryMatrix down;                   // [D, F]
};

// Called with (bytes done, bytes in all) during long work, from the loading thread. The last call
// of a load that succeeds has both equal.
using ProgressFn = std::function<void(int64_t, int64_t)>;

struct LoadOptions {
  ProgressFn progress = nullptr;
  // Packed form: read every byte and check it against its SHA-256. A published checkpoint is always
  // read whole.
  bool verify = false;
  // Threads for quantising and verifying; 0: one for each processor. Does not change the result.
  int threads = 0;
};

// Immutable after construction; safe to share between threads. Owns its mappings and buffers.
class Model {
 public:
  // Loads a model directory in either form (packed: mapped; published: quantised and packed in
  // memory). The error names the file, the tensor and what was expected. NOT_FOUND: a file is
  // missing; INVALID_ARGUMENT: it is there and wrong; UNIMPLEMENTED: a variant that is not
  // supported. A packed model's file must not be rewritten in place while the model lives (replace
  // it by rename, as mmfree-pack does).
  static absl::StatusOr<std::shared_ptr<const Model>> Load(const std::string& directory,
                                                           const ProgressFn& progress = nullptr);
  static absl::StatusOr<std::shared_ptr<const Model>> Load(const std::string& directory,
                                                           const LoadOptions& options);

  // Seeded random ternary weights of a given shape, for benchmarks and tests. About two thirds of
  // the weights are nonzero; norms are near 1, lower bounds rise with the layer, embeddings are
  // fp16; the digest is over the config and the seed. The same on every machine. `config` must be
  // valid; ends the process when there is not enough memory.
  static std::shared_ptr<const Model> Random(const ModelConfig& config, uint64_t seed);

  virtual ~Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const { return config_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Embedding& embedding() const { return embedding_; }
  absl::Span<const float> final_norm() const { return final_norm_; }      // [D] model.norm
  absl::Span<const float> lm_head_norm() const { return lm_head_norm_; }  // [D]
  const TernaryMatrix& lm_head() const { return lm_head_; }               // [V, D]

  // Lower-case hex SHA-256 over the config's numbers and every packed tensor (FORMAT.md): equal for
  // the published and the packed form of one checkpoint. Sessions are bound to it.
  const std::string& digest() const { return digest_; }
  bool packed() const { return packed_; }
  // Ternary codes of all matrices, in bytes; and parameters (weights, embeddings and norms).
  int64_t ternary_bytes() const;
  int64_t parameters() const;

 protected:
  Model() = default;

  ModelConfig config_;
  std::vector<LayerWeights> layers_;
  Embedding embedding_;
  absl::Span<const float> final_norm_;
  absl::Span<const float> lm_head_norm_;
  TernaryMatrix lm_head_;
  std::string digest_;
  bool packed_ = false;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_MODEL_H_
