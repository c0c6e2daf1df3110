// Passing data between the blocks of a cluster: stores into each other's shared memory that
// complete on the receiver's mbarrier, so that what is awaited is the data itself.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_EXCHANGE_CUH_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_EXCHANGE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace mmfree::cuda {

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void ClusterSync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The address, for stores, of what this block has at `address` in the block `rank`.
__device__ __forceinline__ uint32_t InBlock(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores 16 bytes in another block; they complete on `barrier`, which is in the same block.
__device__ __forceinline__ void Send16(uint32_t to, const uint4& value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

// Makes what this thread wrote to shared memory visible to bulk copies.
__device__ __forceinline__ void BulkCopyFence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies `bytes` (a multiple of 16) of this block's shared memory to another block's.
__device__ __forceinline__ void SendBulk(uint32_t to, uint32_t from, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_EXCHANGE_CUH_
