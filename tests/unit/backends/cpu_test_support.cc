#include "tests/unit/backends/cpu_test_support.h"

#include "absl/strings/str_format.h"
#include "server/backends/cpu/kernel_choice.h"
#include "server/base/numerics.h"

namespace mmfree {

void VectorKernelsTest::SetUp() {
  if (!CpuSupports(GetParam())) {
    GTEST_SKIP() << "this processor (" << CpuModelName() << ") has no " << CpuIsaName(GetParam());
  }
  vector_ = &cpu::KernelsFor(GetParam());
  scalar_ = &cpu::ScalarKernels();
}

std::string IsaTestName(const testing::TestParamInfo<CpuIsa>& info) {
  return std::string(CpuIsaName(info.param));
}

uint64_t TestRandom::Next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

float TestRandom::Uniform(float low, float high) {
  return low + (high - low) * (static_cast<float>(Next() >> 40) * 0x1p-24f);
}

std::vector<float> TestRandom::Floats(int64_t n, float low, float high) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = Uniform(low, high);
  return values;
}

testing::AssertionResult SameBits(float expected, float actual) {
  if (FloatToBits(expected) == FloatToBits(actual)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << absl::StreamFormat(
             "expected %a (%08x), got %a (%08x)", static_cast<double>(expected),
             FloatToBits(expected), static_cast<double>(actual), FloatToBits(actual));
}

testing::AssertionResult SameBits(const std::vector<float>& expected,
                                  const std::vector<float>& actual) {
  if (expected.size() != actual.size()) {
    return testing::AssertionFailure()
           << "expected " << expected.size() << " values, got " << actual.size();
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (testing::AssertionResult same = SameBits(expected[i], actual[i]); !same) {
      return same << " at " << i;
    }
  }
  return testing::AssertionSuccess();
}

}  // namespace mmfree
