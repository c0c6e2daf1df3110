// Launchers of the CUDA kernels: raw pointers, sizes and a stream in, cudaError_t out. Nothing here
// allocates or waits. Grids depend on the capacities passed; kernels read the actual counts of a
// step from device memory, so a captured launch serves every step of its bucket.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_KERNELS_H_
#define MMFREE_SERVER_BACKENDS_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/draw_layout.h"
#include "server/backends/cuda/layout.h"

namespace mmfree::cuda {

struct LaunchContext {
  cudaStream_t stream = nullptr;
  // Lets a kernel start before its predecessor has ended (programmatic dependent launch).
  bool overlap = false;
  int32_t num_sms = 0;
  int64_t shared_bytes_per_block = 0;  // what a kernel can opt in to
  // wgmma and bulk copies may be used, and what was measured to be quicker where they are (compute
  // capability 9.0).
  bool hopper = false;
};

// --- device_query.cu

// Runs a kernel of this build on the current device. `has_wgmma`: the machine code it runs there
// was compiled for sm_90a. cudaErrorNoKernelImageForDevice when this build has nothing for the
// device.
cudaError_t QueryKernelBuild(bool* has_wgmma);

// --- repack.cu

// Converts the stored form (four rows a byte) to the device layout. gated_channels > 0: rows
// [0, gated_channels) and [gated_channels, 2 * gated_channels) are paired.
//   stored  [ceil(rows / 4)][stored_cols] on the device
//   out     [row_blocks][k_blocks][kBlockBytes]
cudaError_t LaunchRepack(const uint8_t* stored, int64_t rows, int64_t cols, int64_t stored_cols,
                         int64_t gated_channels, int32_t row_blocks, int32_t k_blocks, uint8_t* out,
                         cudaStream_t stream);

// --- embed.cu

// Copies the used parts of a step's inputs from pinned host memory to the device.
cudaError_t LaunchLoadInputs(const StepInputs& host, const StepInputs& device,
                             const LaunchContext& context);

enum class EmbeddingType : uint8_t { kF32, kF16, kBF16 };
// h[n] = table[tokens[n]], converted exactly.
//   table [vocab][dim]; h [max_tokens][ld]
cudaError_t LaunchEmbed(const void* table, EmbeddingType type, int64_t dim, const StepInputs& in,
                        int32_t max_tokens, float* h, int64_t ld, const LaunchContext& context);

// --- quantize.cu

enum class NormKind : uint8_t {
  kAttention,  // x = h, y = x * w1; three outputs y * w2
  kHidden,     // x = h, y = x * w1; one output y * w2
  kRecurrent,  // x = g, y = GateOutput of the state after one token; one output y * w2
  kScanned,    // x = g, y given; one output y * w2
  kOneNorm,    // x = z; one output x * w2
};

template <NormKind kKind>
struct NormTraits {
  static constexpr int kOutputs = kKind == NormKind::kAttention ? 3 : 1;
  static constexpr bool kOneNorm = kKind == NormKind::kOneNorm;
  static constexpr bool kRecurrent = kKind == NormKind::kRecurrent;
  static constexpr bool kHasY = kKind == NormKind::kScanned;  // given
  static constexpr bool kHasW1 =
      kKind == NormKind::kAttention || kKind == NormKind::kHidden || kRecurrent;
};

struct QuantizeArgs {
  NormKind kind;
  int32_t cols = 0;         // K
  int32_t padded_cols = 0;  // K rounded up to kColumnBlock
  float eps = 0.0f;
  const float* x = nullptr;  // [rows][ld_x]
  int64_t ld_x = 0;
  const float* y = nullptr;  // kScanned: [rows][ld_x]
  // kHidden for the head: which row of x is row n; null: n. Reads HeadInput::token.
  const HeadInput* gather = nullptr;
  const int32_t* num_rows = nullptr;   // on the device
  int32_t row_offset = 0;              // of the first row, in gather and against num_rows
  const float* w1 = nullptr;           // [padded_cols]; kRecurrent: g_norm
  const float* w2[3] = {};             // [padded_cols]
  const float* forget = nullptr;       // kRecurrent: [rows][ld_x]
  const float* input = nullptr;        // kRecurrent: [rows][ld_x]
  const float* lower_bound = nullptr;  // kRecurrent: [padded_cols]
  float* states = nullptr;             // kRecurrent: layer's part, [slots][state_stride]
  int64_t state_stride = 0;
  const RowInput* rows = nullptr;  // kRecurrent: row n is token n
  int8_t* q = nullptr;             // [outputs][k_blocks][stride][128], see layout.h
  RowMeta* meta = nullptr;         // [outputs][stride]
  int32_t stride = 0;
};
// Rows [0, max_rows) that exist. Zeroes the padding of q.
cudaError_t LaunchQuantize(const QuantizeArgs& args, int32_t max_rows,
                           const LaunchContext& context);
// Longest row (cols) that LaunchQuantize takes on a device with this much shared memory a block.
int64_t MaxQuantizeCols(int64_t shared_bytes);
// quantize_row.cu: the same, for what LaunchQuantize leaves to it; padded_cols at most this.
inline constexpr int32_t kMaxQuantizeRowCols = 8192;
cudaError_t LaunchQuantizeRow(const QuantizeArgs& args, int32_t max_rows,
                              const LaunchContext& context);

// --- recurrence.cu

struct ScanArgs {
  const float* forget = nullptr;  // [tokens][ld] f_proj's output; y may overwrite it
  const float* input = nullptr;   // [tokens][ld]
  const float* g = nullptr;       // [tokens][ld]
  int64_t ld = 0;
  const float* g_norm = nullptr;       // [dim]
  const float* lower_bound = nullptr;  // [dim]
  float* states = nullptr;             // layer's part, [slots][state_stride]
  int64_t state_stride = 0;
  int32_t dim = 0;
  float* kept = nullptr;           // likewise, [kept states][state_stride]: see RowInput::kept
  const RowInput* rows = nullptr;  // [rows], the short ones first
  const StepCounts* counts = nullptr;
  float* y = nullptr;  // [tokens][ld]: GateOutput at each token
};
// Advances the states of the rows through their tokens, in order; at most so many short and long
// rows, of which there is one at least.
cudaError_t LaunchScan(const ScanArgs& args, int32_t max_short_rows, int32_t max_long_rows,
                       const LaunchContext& context);

// --- products

enum class Epilogue : uint8_t {
  kStore,     // out[matrix][token][row] = value
  kResidual,  // out[token][row] = fma(float(acc), factor, out[token][row])
  kSwiGlu,    // out[token][channel] = SwiGlu(p, r)
  // Decode only: advances the state by i and f; out[row][channel] = g, gated = GateOutput.
  kRecurrence,
};

struct GemmArgs {
  DeviceMatrix weights;
  Epilogue epilogue = Epilogue::kStore;
  const int8_t* q = nullptr;      // [matrices][k_blocks][stride][128]
  const RowMeta* meta = nullptr;  // [matrices][stride]
  int32_t stride = 0;
  int32_t max_tokens = 0;  // tokens [0, max_tokens) are computed; at most stride
  float* out = nullptr;    // [matrices][max_tokens][ld]
  int64_t ld = 0;          // even; columns beyond the logical ones are written as zeros
  int64_t matrix_stride = 0;
  int32_t tile = -1;  // gemm_wgmma.cu's tile shape, for measurements; -1: the best by estimate
};
// gemm_mma.cu: int8 mma.sync, any number of tokens on any device.
cudaError_t LaunchGemmMma(const GemmArgs& args, const LaunchContext& context);
// gemm_wgmma.cu: needs LaunchContext::hopper; any number of tokens, made for 8 or more. Tiles may
// read up to kRowSlack rows of q past the last.
cudaError_t LaunchGemmWgmma(const GemmArgs& args, const LaunchContext& context);
inline constexpr int32_t kNumWgmmaTiles = 6;

// --- decode.cu

// Rows that one stage kernel takes.
inline constexpr int32_t kMaxDecodeRows = 2;

// A norm (kAttention, kHidden, kScanned or kOneNorm) and the product that follows it, for rows
// [0, max_rows) of one token each. The stages are: kAttention + kRecurrence, kScanned + kResidual,
// kHidden + kSwiGlu, kOneNorm + kResidual, and kHidden + kStore for the head.
struct alignas(16) DecodeArgs {
  NormKind kind = NormKind::kHidden;
  Epilogue epilogue = Epilogue::kStore;
  int32_t max_rows = 0;
  const int32_t* num_rows = nullptr;  // on the device
  int32_t cols = 0;                   // K
  int32_t padded_cols = 0;            // K rounded up to kColumnBlock
  float eps = 0.0f;
  const float* x = nullptr;           // [rows][ld_x]
  int32_t ld_x = 0;                   // a multiple of 4, at most padded_cols
  const float* y = nullptr;           // kScanned: [rows][ld_x]
  const HeadInput* gather = nullptr;  // as in QuantizeArgs
  const float* w1 = nullptr;          // [padded_cols]
  const float* w2[3] = {};            // [padded_cols]
  DeviceMatrix weights;
  float* out = nullptr;  // [rows][ld]
  int64_t ld = 0;
  // kRecurrence:
  float* gated = nullptr;              // [rows][ld]
  const float* g_norm = nullptr;       // [padded_cols]
  const float* lower_bound = nullptr;  // [padded_cols]
  float* states = nullptr;             // layer's part, [slots][state_stride]
  int64_t state_stride = 0;
  const RowInput* rows = nullptr;
  // Set by LaunchDecode or PlanPersistentDecode: tiles (of each matrix) in all, of how many slots,
  // and a block's share where stages are kernels.
  int32_t units = 0;
  int32_t unit_rows = kTileRows;
  int32_t units_per_block = 0;
};
// Whether LaunchDecode takes such a model on a device with this much shared memory a block.
bool DecodeFits(int64_t dim, int64_t channels, int64_t shared_bytes);
cudaError_t LaunchDecode(const DecodeArgs& args, const LaunchContext& context);

// --- decode_persistent.cu

// What the blocks of a persistent kernel exchange (persistent_exchange.cuh). Of each set, in floats
// from its beginning: outputs of a layer's stages.
inline constexpr int32_t kExchangeSets = 3;
inline constexpr uint32_t kExchangeMissing = 0xffffffffu;  // in every place that is not written
struct ExchangeState {
  int32_t first_set;  // of the next launch
  uint32_t exits;     // blocks that have left this one
};
struct PersistentExchange {
  float* first = nullptr;  // [kExchangeSets][set_floats]
  int32_t set_floats = 0;
  int32_t gated = 0;   // [rows][ld] what the recurrence writes beside g, which is at 0
  int32_t middle = 0;  // [rows][ld] the residual stream after the recurrence's part
  int32_t hidden = 0;  // [rows][ld] and after the layer
  int32_t z = 0;       // [rows][ld of channels]
  ExchangeState* state = nullptr;
};

// A block's dynamic shared memory: offsets in bytes, for all stages.
struct PersistentShared {
  int32_t ring = 0;   // [warps][depth] pieces of 512 bytes
  int32_t x = 0;      // [rows][padded] x, and but for kOneNorm the same of y
  int32_t norms = 0;  // w2, and w1 where there is one
  int32_t codes = 0;
  int32_t sums[2] = {};  // of stages of even and of odd index
  int32_t runs = 0;      // [warps][runs_per_warp] where the pieces lie in the weights
  int32_t bytes = 0;
  int32_t depth = 0;
  int32_t num_sums = 0;
  int32_t runs_per_warp = 0;
};

// A kind of stage (four a layer, and the head), the same in every layer, and how it is split.
inline constexpr int kPersistentWarps = 16;  // of a block
inline constexpr int kStageKinds = 5;
struct PersistentKind {
  uint32_t weights_at = 0;  // of the first layer, in 16 bytes from the first layer's first
  int32_t row_blocks = 0;   // of each matrix
  int32_t k_blocks = 0;
  int32_t matrices = 0;
  int32_t units = 0;  // as in DecodeArgs
  int32_t unit_rows = 0;
  // Of a block with units / blocks units and of one with one more: the first piece of each warp.
  int16_t first_piece[2][kPersistentWarps + 1] = {};
};

struct PersistentDecodeArgs {
  const DecodeArgs* stages = nullptr;  // on the device: four a layer, then the head's
  int32_t num_stages = 0;              // to run: four a layer, or one more
  PersistentExchange exchange;
  StackedWeights weights;
  // Set by PlanPersistentDecode, as are the places of `exchange`:
  float root_eps = 0.0f;  // at least the square root of the norms' eps
  PersistentShared shared;
  int32_t blocks = 0;
  PersistentKind kinds[kStageKinds];
};
// persistent_plan.cc: completes stages [0, num_stages) on the host for steps of `rows` rows, the
// last being the head's, and `args`, of which `weights` is set; false when the device cannot run
// them so.
bool PlanPersistentDecode(DecodeArgs* stages, int32_t num_stages, int32_t rows,
                          const LaunchContext& context, PersistentDecodeArgs* args);
// Runs the stages one after the other. Every multiprocessor must be free of work that does not end
// by itself.
cudaError_t LaunchPersistentDecode(const PersistentDecodeArgs& args, int32_t rows,
                                   const LaunchContext& context);

// --- decode_cluster.cu

inline constexpr int32_t kClusterBlocks = 16;
// A stage's norm sums in kNormLanes lanes: a block has as many neighbouring ones.
inline constexpr int32_t kClusterLanes = 16;
inline constexpr int32_t kClusterStages = 4;  // of a layer

// A block's dynamic shared memory: offsets in bytes.
struct ClusterShared {
  int32_t ring = 0;    // [warps][depth] units of weights
  int32_t codes = 0;   // [blocks] of what each sends for a stage
  int32_t sums = 0;    // [tiles][kTileRows][rows + 1], zeros between two stages
  int32_t hidden = 0;  // [rows][own columns] the residual stream
  int32_t gates = 0;   // [rows][own columns] g of the recurrence
  int32_t values = 0;  // [rows][own columns] what is quantised next
  int32_t stats = 0;   // [blocks][rows] NormStats of each block's columns
  int32_t norms = 0;   // [2][norm_floats] of two layers
  int32_t runs = 0;    // [warps][runs_per_warp]
  int32_t bytes = 0;
  int32_t depth = 0;
  int32_t runs_per_warp = 0;
};

// All layers of a step of single tokens. Each cluster of kClusterBlocks blocks takes `rows` rows at
// a time through all of them.
struct ClusterDecodeArgs {
  int32_t rows = 0;      // of a cluster at a time: 2, 4 or 8
  int32_t clusters = 0;  // that run at the same time at most
  StackedWeights weights;
  DeviceMatrix stages[kClusterStages];  // the first layer's i|f|g, o, gate and down
  int32_t dim = 0;                      // multiples of kNormLanes
  int32_t channels = 0;
  float eps = 0.0f;
  // [layers][kClusterBlocks][norm_floats]: a block's columns of the layer's vectors
  // (cluster_plan.h).
  const float* norms = nullptr;
  int32_t norm_floats = 0;
  float* h = nullptr;  // [rows][ld_h] the residual stream
  int64_t ld_h = 0;
  float* states = nullptr;  // [slots][state_stride]
  int64_t state_stride = 0;
  const RowInput* inputs = nullptr;  // row n is token n
  const StepCounts* counts = nullptr;
  ClusterShared shared;
};
// Completes `args`, of which rows, weights, stages, dim, channels and norm_floats are set, for the
// current device; false when it cannot run them so.
bool PlanClusterDecode(const LaunchContext& context, ClusterDecodeArgs* args);
// For steps of at most `max_rows` rows.
cudaError_t LaunchClusterDecode(const ClusterDecodeArgs& args, int32_t max_rows,
                                const LaunchContext& context);

// --- sample.cu

// Samples and scores rows of logits.
//   logits [rows][ld]; stats [rows]; heads, out: of the row_offset-th head on
cudaError_t LaunchSample(const float* logits, int64_t ld, int32_t vocab, const StepInputs& in,
                         int32_t row_offset, int32_t max_rows, HeadStats* stats, HeadOutput* out,
                         const LaunchContext& context);

// --- draw.cu

struct DrawArgs {
  const float* logits = nullptr;  // [rows][ld], of heads from first_head on
  int64_t ld = 0;
  int32_t vocab = 0;
  int32_t first_head = 0;
  const HeadStats* stats = nullptr;    // [rows]
  const DrawInput* inputs = nullptr;   // [count]
  const DrawEntry* entries = nullptr;  // where DrawInput::entries points into
  const uint32_t* masks = nullptr;     // [masks][mask_words], bit id % 32 of word id / 32
  int64_t mask_words = 0;
  int32_t count = 0;
  float* scratch = nullptr;   // [num_sms][vocab] where DrawFitsShared is false
  DrawOutput* out = nullptr;  // [count], pinned
};
// Whether a row of logits fits a block's shared memory.
bool DrawFitsShared(int64_t vocab, int64_t shared_bytes_per_block);
// Makes the draws: those of DrawToken (server/sampling/token_draw.h).
cudaError_t LaunchDraw(const DrawArgs& args, const LaunchContext& context);

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_KERNELS_H_
