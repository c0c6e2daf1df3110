// A warp's way through its weights in a persistent decode kernel: a ring of pieces (16 rows x 128
// columns, 512 bytes) in shared memory, filled ahead in the order of its work over all stages.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/decode_stage.cuh"
#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/kernels.h"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/persistent_block.cuh"

namespace mmfree::cuda {

inline constexpr int kPieceBytes = kBlockBytes / 4;

// Pieces of one tile, one k-block after the other.
struct PieceRun {
  uint32_t at;  // of the first, in 16 bytes from where the weights begin
  int pieces;
};

// Each lane copies, and later reads, 16 bytes of a piece by itself, so that nothing but its own
// copies is waited for. One object a thread.
template <int kDepth>
class WeightRing {
 public:
  // `runs`: room for the warp's list, `ring`: for its kDepth pieces.
  __device__ __forceinline__ WeightRing(const PersistentDecodeArgs& kernel, PieceRun* runs,
                                        uint8_t* ring)
      : kernel_(kernel), runs_(runs), ring_(SharedAddress(ring) + threadIdx.x % 32 * 16) {}

  // Lists the warp's share of a kind of stage of a layer; called for each kind in turn, then for
  // the head. Pieces [first, end) of a block's units.
  __device__ __forceinline__ void List(const DecodeArgs& args, int first_unit, int first, int end);
  // All kinds of a layer have been listed.
  __device__ __forceinline__ void EndLayer() { layer_end_ = listed_; }
  // Everything has been listed: fills the ring.
  __device__ __forceinline__ void Start();

  // Waits until the next `kCount` pieces are there.
  template <int kCount>
  __device__ __forceinline__ void Wait() const {
    static_assert(kCount <= kDepth);
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - kCount) : "memory");
  }
  // This lane's part of the next piece.
  __device__ __forceinline__ uint4 Read() {
    const uint4 words = LoadShared16(ring_ + read_at_);
    read_at_ = Next(read_at_);
    return words;
  }
  // Begins to copy one more piece, if there is one, in the place of one that was read.
  __device__ __forceinline__ void Fetch() {
    if (left_ > 0) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(ring_ + fetch_at_),
                   "l"(from_)
                   : "memory");
      from_ += kBlockBytes;
      fetch_at_ = Next(fetch_at_);
      if (--left_ == 0) BeginRun();
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

 private:
  static __device__ __forceinline__ uint32_t Next(uint32_t at) {
    return at == (kDepth - 1) * kPieceBytes ? 0 : at + kPieceBytes;
  }
  __device__ __forceinline__ void BeginRun();

  const PersistentDecodeArgs& kernel_;
  PieceRun* const runs_;  // of a layer, which is the same for all, and then of the head
  const uint32_t ring_;   // address of this lane's part of the first place
  int listed_ = 0;
  int layer_end_ = 0;
  int run_ = 0;  // the next to begin
  int layer_ = 0;
  int left_ = 0;  // pieces of the present run
  const uint8_t* from_ = nullptr;
  uint32_t fetch_at_ = 0;  // offset of the place of the next piece to copy,
  uint32_t read_at_ = 0;   // and to read
};

template <int kDepth>
__device__ __forceinline__ void WeightRing<kDepth>::List(const DecodeArgs& args, int first_unit,
                                                         int first, int end) {
  if (first == end) return;
  const int per_unit = TilesPerUnit(args.kind);
  const int k_blocks = args.weights.k_blocks;
  const int first_tile = first / k_blocks;
  const int tiles = (end - 1) / k_blocks - first_tile + 1;
  const uint32_t weights_at = static_cast<uint32_t>((args.weights.codes - kernel_.weights) / 16);
  for (int n = static_cast<int>(threadIdx.x) % 32; n < tiles; n += 32) {
    const int tile = first_tile + n;
    const int k_block = n == 0 ? first % k_blocks : 0;
    const int row_tile = first_unit + tile / per_unit;
    const uint32_t block = static_cast<uint32_t>(
        (tile % per_unit * args.weights.row_blocks + row_tile / 4) * k_blocks + k_block);
    runs_[listed_ + n] = {weights_at + block * (kBlockBytes / 16) + row_tile % 4 * 32,
                          min(k_blocks, end - tile * k_blocks) - k_block};
  }
  listed_ += tiles;
}

template <int kDepth>
__device__ __forceinline__ void WeightRing<kDepth>::Start() {
  __syncwarp();
  if (layer_end_ == 0) layer_ = kernel_.num_layers;
  BeginRun();
  for (int n = 0; n < kDepth; ++n) Fetch();
}

// Goes to the run at run_, if there is one.
template <int kDepth>
__device__ __forceinline__ void WeightRing<kDepth>::BeginRun() {
  if (layer_ < kernel_.num_layers && run_ == layer_end_) {
    // The head's runs come after a layer's, and have their own places.
    ++layer_;
    if (layer_ < kernel_.num_layers) run_ = 0;
  }
  if (layer_ == kernel_.num_layers && run_ >= listed_) return;
  const PieceRun run = runs_[run_++];
  const uint64_t layer_at =
      layer_ < kernel_.num_layers ? uint64_t{kernel_.layer_stride} * layer_ : 0;
  from_ = kernel_.weights + (layer_at + run.at + threadIdx.x % 32) * 16;
  left_ = run.pieces;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_
