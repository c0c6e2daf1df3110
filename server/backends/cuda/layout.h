// Layouts of weights, activations and step inputs on the device. Host and device.
//
// Weights. Rows are padded to blocks of 64 and columns to blocks of 128 with code 1 (weight 0).
// A block of 64 x 128 weights is 2 KiB: [4 tiles of 16 rows][32 lanes][16 bytes]. Lane (g = lane/4,
// t = lane%4) holds, for rows "slot g" and "slot g+8" of its tile, one 32-bit word for each of the
// four k-steps of 32 columns: byte j, bits [2i, 2i+2) is the code of slot g + 8*(i&1), column
// 32*step + 16*(i>>1) + 4t + j. Register i of the A fragment of mma.m16n8k32 (and of one warp's
// part of wgmma.m64nNk32) is then a mask of the word: (w & 0x03030303), (w & 0x0c0c0c0c) and the
// same of w >> 4. The second slot's codes come out times four; so do its sums, exactly.
//
// A matrix's logical rows are dealt to slots so that a lane's two rows belong together:
//   plain: slots g and g+8 of tile n are rows 16n + 2g and 16n + 2g + 1;
//   gated: slots g and g+8 of tile n are rows p and r of channel 8n + g.
//
// Activations. int8 codes q[matrix][k_block][stride rows][128], the eight 16-byte chunks of a row
// stored at position chunk ^ (row & 7): the swizzle that ldmatrix and wgmma read without bank
// conflicts, so a tile of rows is one contiguous piece that is copied as it is.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_LAYOUT_H_
#define MMFREE_SERVER_BACKENDS_CUDA_LAYOUT_H_

#include <cstdint>

namespace mmfree::cuda {

inline constexpr int kRowBlock = 64;
inline constexpr int kTileRows = 16;
inline constexpr int kLogTileRows = 4;
inline constexpr int kColumnBlock = 128;
inline constexpr int kBlockBytes = kRowBlock * kColumnBlock / 4;

// A piece of weights is a tile's part of a block: 16 rows x 128 columns.
inline constexpr int kPieceBytes = kBlockBytes / 4;

// Units of one tile, one after the other, on a warp's way through its weights. A unit is one or
// more pieces of k-blocks that follow each other, or (kHalved) the halves of two: eight rows of one
// k-block and the same of the next.
struct UnitRun {
  uint32_t at;  // of the first, in 16 bytes from where the weights begin
  int units;    // and kHalved
};
inline constexpr int kHalved = 1 << 30;

inline constexpr int kCodePadding = 16;  // bytes; rows of codes start in different banks

// Activation buffers are this many rows longer than a step, so that a tile may read past its end.
inline constexpr int kRowSlack = 256;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// One or, for i|f|g, three matrices of equal size, one after the other.
struct DeviceMatrix {
  const uint8_t* codes = nullptr;  // [matrices][row_blocks][k_blocks][kBlockBytes]
  float scale[3] = {0.0f, 0.0f, 0.0f};
  int32_t matrices = 1;
  int32_t row_blocks = 0;
  int32_t k_blocks = 0;
};

// The weights of a model's layers, which lie alike.
struct StackedWeights {
  const uint8_t* first = nullptr;  // the first layer's
  uint32_t stride = 0;             // from a layer's to the next one's, in 16 bytes
  int32_t layers = 0;
};

// How the codes of a row become floats: y = float(sum of code * q - code_sum) * (out * scale).
struct alignas(8) RowMeta {
  float out;
  int32_t code_sum;
};

struct StepCounts {
  int32_t tokens = 0;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t short_rows = 0;
};

// Rows of at most this many tokens are short, and so are rewindable ones of any length: the
// recurrence has a kernel of its own for them.
inline constexpr int32_t kShortRowTokens = 64;

struct alignas(16) RowInput {
  int32_t slot;
  int32_t first_token;  // index in the step
  int32_t num_tokens;
  // Where the states after its tokens but the last are kept; -1: they are not.
  int32_t kept;
};

// One row of logits and what is wanted of it.
struct alignas(16) HeadInput {
  uint64_t seed;
  uint64_t position;  // of the sampled token
  int32_t token;      // index in the step
  int32_t target;     // -1: none
  float temperature;  // < 0: no sampling
  uint32_t candidate;
  int32_t banned_begin;  // in the pool of banned ids
  int32_t banned_count;
  int32_t unused[2];
};

struct alignas(16) HeadOutput {
  int32_t sampled;
  float sampled_logprob;
  int32_t argmax;
  float target_logprob;
};

// The inputs of a step, in pinned memory or on the device; arrays at full capacity.
struct StepInputs {
  StepCounts* counts;  // [1]
  int32_t* tokens;     // [max_step_tokens]
  RowInput* rows;      // [max_rows], the short ones first
  HeadInput* heads;    // [max_step_tokens]
  int32_t* banned;     // [max_step_tokens * kMaxBannedTokens]
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_LAYOUT_H_
