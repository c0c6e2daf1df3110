// The forward pass of one chunk of a step.
#ifndef MMFREE_SERVER_BACKENDS_CPU_FORWARD_H_
#define MMFREE_SERVER_BACKENDS_CPU_FORWARD_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/backends/backend.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/panel.h"
#include "server/backends/cpu/slices.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/backends/cpu/weights.h"
#include "server/model/model.h"
#include "server/model/region.h"

namespace mmfree::cpu {

// Consecutive tokens of one sequence within a chunk.
struct Segment {
  float* state;   // [num_layers, hidden_size], updated
  int32_t first;  // index of its first token in the chunk
  int32_t count;
  const float* from;  // what `state` is set to first, as long; null: it is as it was
};

// A position whose logits are needed, and what for. Null pointers: not asked for.
struct OutputPosition {
  int32_t token;  // index in the chunk
  const SamplingParams* sampling;
  uint64_t sample_position;  // context position of the sampled token
  SampledToken* sample;
  int32_t target;
  TokenScore* score;
  float* logits;  // [vocab_size]
};

struct Chunk {
  absl::Span<const int32_t> tokens;  // 1 to Forward::max_tokens(), each in [0, vocab_size)
  absl::Span<const Segment> segments;
  absl::Span<const OutputPosition> outputs;  // by rising token
};

// The model's layers over all tokens of a chunk at once: every product is one matrix product over
// the chunk, the recurrence a scan along each segment. Each thread owns a slice of the channels, so
// the recurrence, the gate and the residual follow a product without a barrier; what needs a whole
// row (a norm's sums and maximum) stands between barriers.
//
// Not thread-safe: one Run at a time.
class Forward {
 public:
  // RESOURCE_EXHAUSTED when the scratch memory for chunks of up to `max_tokens` cannot be had.
  // `weights` are the model's.
  static absl::StatusOr<std::unique_ptr<Forward>> Create(const Model* model, Weights weights,
                                                         const Kernels* kernels, ThreadPool* pool,
                                                         int32_t max_tokens);

  int32_t max_tokens() const { return max_tokens_; }
  void Run(const Chunk& chunk);

 private:
  // Rows that a norm or two stacked ones quantise: NormInput for row r is at row `rows[r]` of x and
  // y.
  struct NormRows {
    const float* x;  // [.., ld]
    const float* y;  // [.., ld] or null
    int64_t ld;
    const OutputPosition* positions;  // null: row r is row r
    const float* w1;
    const float* w2[3];
    const TernaryMatrix* matrices[3];  // what the codes for each w2 are multiplied with
    int32_t count;                     // of w2
    int64_t n;
    const PanelLayout* layout;
  };

  // Quantised rows, ready for the products.
  struct Codes {
    const int8_t* panel[3];
    const int32_t* sums[3];
    const float* factors[3];
    const PanelLayout* layout;
  };

  // One thread's own memory.
  struct ThreadScratch {
    Region panel;     // for a chunk of one token: the codes, made by every thread for itself
    Region blocks;    // two blocks of product outputs
    int32_t sums[3];  // as panel
    float factors[3];
  };

  Forward() = default;
  absl::Status Allocate();

  void Work(int thread, const Chunk& chunk);
  void Embed(int thread, const Chunk& chunk);
  void Attention(int thread, const Chunk& chunk, int64_t layer);
  void Mlp(int thread, const Chunk& chunk, int64_t layer);
  void Head(int thread, const Chunk& chunk);

  // Quantises `tokens` rows. One row: by each thread for itself, which is cheaper than a barrier;
  // more: each thread its share, then a barrier.
  Codes Quantize(int thread, int32_t tokens, const NormRows& rows);
  void QuantizeRow(const NormRows& rows, int32_t row, int8_t* const panel[3],
                   int32_t* const sums[3], float* const factors[3], int32_t at) const;
  // Rows `rows` of `matrix` times codes number `which`.
  void Product(const TernaryMatrix& matrix, Range rows, const Codes& codes, int which, float* out,
               int64_t ld, bool accumulate) const;
  // What `output` asks for; sampling comes last, for it overwrites banned logits.
  void Emit(const OutputPosition& output, absl::Span<float> logits) const;

  Range Slice(int64_t n, int thread) const { return ThreadSlice(n, thread, pool_->size()); }
  // Floats of a block of product outputs.
  int64_t BlockFloats() const;
  // Channels per block of products whose outputs a thread uses at once.
  int64_t BlockWidth(int32_t tokens) const;

  const Model* model_ = nullptr;
  Weights weights_;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  int32_t max_tokens_ = 0;
  int64_t hidden_ = 0;        // D
  int64_t intermediate_ = 0;  // F
  int64_t vocab_ = 0;         // V
  int64_t ld_hidden_ = 0;     // D and F rounded up to an odd number of cache lines
  int64_t ld_intermediate_ = 0;

  Region floats_;
  float* h_ = nullptr;       // [max_tokens, ld_hidden] residual stream
  float* g_ = nullptr;       // [max_tokens, ld_hidden] output of g_proj
  float* y_ = nullptr;       // [max_tokens, ld_hidden] output of the recurrence
  float* z_ = nullptr;       // [max_tokens, ld_intermediate] output of the gated MLP
  float* logits_ = nullptr;  // [kHeadRows, ld_vocab]
  int64_t ld_vocab_ = 0;
  Region panel_;
  int8_t* codes_[3] = {};  // panels of up to max_tokens rows; the first is wide enough for F
  std::vector<int32_t> sums_[3];
  std::vector<float> factors_[3];
  std::vector<ThreadScratch> threads_;

  // For the chunk being run.
  PanelLayout hidden_layout_;
  PanelLayout intermediate_layout_;
  PanelLayout head_layout_;       // kHeadRows rows
  PanelLayout last_head_layout_;  // the outputs that do not fill such a block
};

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_FORWARD_H_
