// For tests that need a GPU.
#ifndef MMFREE_TESTS_GPU_SKIP_WITHOUT_GPU_H_
#define MMFREE_TESTS_GPU_SKIP_WITHOUT_GPU_H_

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "server/backends/cuda/cuda_backend.h"

// Skips the test where no usable device is there (and says why).
#define MMFREE_SKIP_WITHOUT_GPU()                                                       \
  if (const absl::Status mmfree_gpu_ = mmfree::CheckCudaDevice(0); !mmfree_gpu_.ok()) { \
    GTEST_SKIP() << "no usable CUDA device: " << mmfree_gpu_.message();                 \
  }                                                                                     \
  static_assert(true, "")

#endif  // MMFREE_TESTS_GPU_SKIP_WITHOUT_GPU_H_
