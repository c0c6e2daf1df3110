// What the tests of the CPU kernels share.
#ifndef MMFREE_TESTS_UNIT_BACKENDS_CPU_TEST_SUPPORT_H_
#define MMFREE_TESTS_UNIT_BACKENDS_CPU_TEST_SUPPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/backends/cpu/kernels.h"
#include "server/base/cpu_features.h"

namespace mmfree {

// The vector instruction sets; the scalar kernels are what they are compared with.
inline constexpr CpuIsa kVectorIsas[] = {CpuIsa::kAvx2, CpuIsa::kAvxVnni, CpuIsa::kAvx512,
                                         CpuIsa::kAvx512Gfni, CpuIsa::kAmx};

// One test for each vector instruction set; skips, visibly, where the processor lacks it.
class VectorKernelsTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override;

  const cpu::Kernels* vector_ = nullptr;
  const cpu::Kernels* scalar_ = nullptr;
};

std::string IsaTestName(const testing::TestParamInfo<CpuIsa>& info);

// A fixed pseudo-random sequence (SplitMix64).
class TestRandom {
 public:
  explicit TestRandom(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // In [low, high).
  float Uniform(float low, float high);
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next() % static_cast<uint64_t>(n)); }
  std::vector<float> Floats(int64_t n, float low, float high);

 private:
  uint64_t state_;
};

// Equal bytes, with the first difference in the message.
testing::AssertionResult SameBits(const std::vector<float>& expected,
                                  const std::vector<float>& actual);
testing::AssertionResult SameBits(float expected, float actual);

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_BACKENDS_CPU_TEST_SUPPORT_H_
