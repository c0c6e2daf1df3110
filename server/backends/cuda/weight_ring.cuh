// A warp's way through its weights in a kernel of many stages: a ring of pieces (16 rows x 128
// columns, 512 bytes) in shared memory, filled ahead in the order of its work over all stages.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "server/backends/cuda/hopper.cuh"
#include "server/backends/cuda/launch.cuh"
#include "server/backends/cuda/layout.h"

namespace mmfree::cuda {

// Each lane copies, and later reads, 16 bytes of a piece by itself, so that nothing but its own
// copies is waited for. One object a thread. kDepth units of kPieces pieces. kMayHalve: runs may be
// kHalved; a unit's first 256 bytes are then eight rows of one k-block, the others of the next.
template <int kDepth, int kPieces = 1, bool kMayHalve = false>
class WeightRing {
 public:
  static constexpr int kUnitBytes = kPieces * kPieceBytes;

  // Goes `passes` times through the layers. `runs`: room for the warp's list, `ring`: for its
  // kDepth units.
  __device__ __forceinline__ WeightRing(const StackedWeights& weights, int passes, UnitRun* runs,
                                        uint8_t* ring)
      : weights_(weights),
        runs_(runs),
        ring_(SharedAddress(ring) + threadIdx.x % 32 * 16),
        layers_left_(passes * weights.layers) {}

  // Lists the warp's share of a kind of stage of a layer, `count` runs of which the lanes write
  // some each; called for each kind in turn, then for what comes after the last layer.
  template <typename RunOf>
  __device__ __forceinline__ void List(int count, RunOf run_of) {
    for (int n = static_cast<int>(threadIdx.x) % 32; n < count; n += 32) {
      runs_[listed_ + n] = run_of(n);
    }
    listed_ += count;
  }
  // All kinds of a layer have been listed.
  __device__ __forceinline__ void EndLayer() { layer_end_ = listed_; }
  // Everything has been listed: fills the ring.
  __device__ __forceinline__ void Start();

  // Waits until the next `kCount` units are there.
  template <int kCount>
  __device__ __forceinline__ void Wait() const {
    static_assert(kCount <= kDepth);
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - kCount) : "memory");
  }
  // Waits for all that is being copied.
  __device__ __forceinline__ void Drain() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  // This lane's parts of the next unit.
  __device__ __forceinline__ void Read(uint4 (&words)[kPieces]) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) words[i] = LoadShared16(ring_ + read_at_ + i * kPieceBytes);
    read_at_ = Next(read_at_);
  }
  // Begins to copy one more unit, if there is one, in the place of one that was read.
  __device__ __forceinline__ void Fetch() {
    if (left_ > 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(ring_ + fetch_at_ +
                                                                                i * kPieceBytes),
                     "l"(from_ + i * kBlockBytes)
                     : "memory");
      }
      from_ += kMayHalve ? step_ : kPieces * kBlockBytes;
      fetch_at_ = Next(fetch_at_);
      if (--left_ == 0) BeginRun();
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

 private:
  static __device__ __forceinline__ uint32_t Next(uint32_t at) {
    return at == (kDepth - 1) * kUnitBytes ? 0 : at + kUnitBytes;
  }
  __device__ __forceinline__ void BeginRun();

  const StackedWeights& weights_;
  UnitRun* const runs_;  // of a layer, which is the same for all, and then of what follows them
  const uint32_t ring_;  // address of this lane's part of the first place
  int layers_left_;      // including the one that is copied from
  int layer_ = 0;
  int listed_ = 0;
  int layer_end_ = 0;
  int run_ = 0;   // the next to begin
  int left_ = 0;  // units of the present run
  const uint8_t* from_ = nullptr;
  uint32_t step_ = kPieces * kBlockBytes;  // from a unit to the next, of the present run
  uint32_t fetch_at_ = 0;                  // offset of the place of the next unit to copy,
  uint32_t read_at_ = 0;                   // and to read
};

template <int kDepth, int kPieces, bool kMayHalve>
__device__ __forceinline__ void WeightRing<kDepth, kPieces, kMayHalve>::Start() {
  __syncwarp();
  if (layer_end_ == 0) layers_left_ = 0;
  BeginRun();
  for (int n = 0; n < kDepth; ++n) Fetch();
}

// Goes to the run at run_, if there is one.
template <int kDepth, int kPieces, bool kMayHalve>
__device__ __forceinline__ void WeightRing<kDepth, kPieces, kMayHalve>::BeginRun() {
  if (layers_left_ > 0 && run_ == layer_end_) {
    // What follows the layers has its own places in the list.
    if (--layers_left_ > 0) run_ = 0;
    if (++layer_ == weights_.layers) layer_ = 0;
  }
  if (layers_left_ == 0 && run_ >= listed_) return;
  const UnitRun run = runs_[run_++];
  const uint64_t layer_at = layers_left_ > 0 ? uint64_t{weights_.stride} * layer_ : 0;
  uint32_t lane = threadIdx.x % 32;
  left_ = run.units;
  if constexpr (kMayHalve) {
    const bool halved = run.units >= kHalved;
    if (halved) {
      left_ -= kHalved;
      lane = lane % 16 + lane / 16 * (kBlockBytes / 16);
    }
    step_ = halved ? 2 * kBlockBytes : kBlockBytes;
  }
  from_ = weights_.first + (layer_at + run.at + lane) * 16;
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_WEIGHT_RING_CUH_
