// A block's part of a layer's vectors for the cluster decode kernel, one after the other: of each
// vector the block's own columns (cluster_block.cuh). Host and device.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_LAYOUT_H_
#define MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_LAYOUT_H_

#include <cstdint>

#include "server/backends/cuda/kernels.h"
#include "server/base/numerics.h"

namespace mmfree::cuda {

// Vectors of `dim` columns, then the one of `channels`, then the scales of the weights of i, f, g,
// o, gate and down.
enum ClusterVector : int {
  kAttnNorm,
  kINorm,
  kFNorm,
  kGNormIn,
  kGNorm,
  kONorm,
  kMlpNorm,
  kGateNorm,
  kLowerBound,
  kDownNorm,
};
inline constexpr int kClusterScales = 8;  // floats, the last two unused

// A block's own columns of a vector.
constexpr int OwnColumns(int columns) { return columns / kNormLanes * kClusterLanes; }

// Where a vector begins, in floats.
constexpr int VectorAt(int vector, int dim) { return vector * OwnColumns(dim); }
constexpr int ScalesAt(int dim, int channels) {
  return VectorAt(kDownNorm, dim) + OwnColumns(channels);
}
constexpr int NormFloats(int dim, int channels) { return ScalesAt(dim, channels) + kClusterScales; }

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CLUSTER_LAYOUT_H_
