// Ternary products: exact, whatever the tile shape, the tails, the rows asked for and the values.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "server/backends/cpu/kernel_choice.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/panel.h"
#include "server/model/ternary.h"
#include "tests/unit/backends/cpu_test_support.h"

namespace mmfree {
namespace {

using cpu::Kernels;
using cpu::PanelLayout;

// A matrix in the packed form with its dense weights, and rows of codes.
struct Problem {
  int64_t rows;
  int64_t cols;
  int32_t tokens;
  std::vector<int8_t> weights;  // [rows, cols]
  std::vector<uint8_t> packed;  // server/model/ternary.h
  std::vector<int8_t> codes;    // [tokens, cols]
  std::vector<float> factors;   // [tokens]
  std::vector<float> initial;   // [tokens, rows]

  int64_t padded_cols() const { return TernaryMatrix::PaddedCols(cols); }
};

void Pack(Problem& problem) {
  const int64_t padded = problem.padded_cols();
  problem.packed.assign(static_cast<size_t>(TernaryMatrix::Bytes(problem.rows, problem.cols)),
                        kTernaryZeroByte);
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t k = 0; k < problem.cols; ++k) {
      uint8_t& byte = problem.packed[static_cast<size_t>(row / 4 * padded + k)];
      const int shift = static_cast<int>(2 * (row % 4));
      const int code = problem.weights[static_cast<size_t>(row * problem.cols + k)] + 1;
      byte = static_cast<uint8_t>((byte & ~(3 << shift)) | (code << shift));
    }
  }
}

Problem RandomProblem(TestRandom& random, int64_t rows, int64_t cols, int32_t tokens) {
  Problem problem = {rows, cols, tokens, {}, {}, {}, {}, {}};
  problem.weights.resize(static_cast<size_t>(rows * cols));
  for (int8_t& w : problem.weights) w = static_cast<int8_t>(random.Below(3) - 1);
  problem.codes.resize(static_cast<size_t>(tokens * cols));
  for (int8_t& q : problem.codes) q = static_cast<int8_t>(random.Below(256) - 128);
  problem.factors = random.Floats(tokens, 0.001f, 0.1f);
  problem.initial = random.Floats(tokens * rows, -1.0f, 1.0f);
  Pack(problem);
  return problem;
}

// What the product must give, from the definition.
std::vector<float> Expected(const Problem& p, int64_t row_begin, int64_t row_end, bool accumulate) {
  std::vector<float> out = p.initial;
  for (int32_t t = 0; t < p.tokens; ++t) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      int32_t sum = 0;
      for (int64_t k = 0; k < p.cols; ++k) {
        sum += p.weights[static_cast<size_t>(row * p.cols + k)] *
               p.codes[static_cast<size_t>(t * p.cols + k)];
      }
      float& value = out[static_cast<size_t>(t * p.rows + row - row_begin)];
      const float factor = p.factors[static_cast<size_t>(t)];
      value = accumulate ? std::fma(static_cast<float>(sum), factor, value)
                         : static_cast<float>(sum) * factor;
    }
  }
  return out;
}

std::vector<float> Actual(const Kernels& kernels, const Problem& p, int64_t row_begin,
                          int64_t row_end, bool accumulate) {
  PanelLayout layout;
  layout.Set(kernels, p.tokens, p.padded_cols());
  // Bytes that belong to no token or column must not matter, so they are not zero.
  std::vector<int8_t> panel(static_cast<size_t>(layout.bytes()), 77);
  std::vector<int32_t> sums(static_cast<size_t>(p.tokens));
  for (int32_t t = 0; t < p.tokens; ++t) {
    const cpu::CodePlace place = layout.Place(panel.data(), t);
    for (int64_t k = 0; k < p.padded_cols(); ++k) {
      const int8_t code = k < p.cols ? p.codes[static_cast<size_t>(t * p.cols + k)] : int8_t{0};
      place.codes[k / place.chunk * place.stride + k % place.chunk] = code;
      sums[static_cast<size_t>(t)] += code;
    }
  }
  std::vector<float> out = p.initial;
  cpu::ProductArgs args;
  args.codes = p.packed.data();
  args.padded_cols = p.padded_cols();
  args.row_begin = row_begin;
  args.row_end = row_end;
  args.panel = panel.data();
  args.tiles = layout.tiles().data();
  args.num_tiles = static_cast<int32_t>(layout.tiles().size());
  args.sums = sums.data();
  args.factors = p.factors.data();
  args.out = out.data();
  args.ld = p.rows;
  args.accumulate = accumulate;
  kernels.product(args);
  return out;
}

void ExpectExact(const Kernels& kernels, const Problem& p, int64_t row_begin, int64_t row_end) {
  for (bool accumulate : {false, true}) {
    EXPECT_TRUE(SameBits(Expected(p, row_begin, row_end, accumulate),
                         Actual(kernels, p, row_begin, row_end, accumulate)))
        << p.rows << " x " << p.cols << ", " << p.tokens << " tokens, rows " << row_begin << " to "
        << row_end;
  }
}

class ProductTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!CpuSupports(GetParam())) {
      GTEST_SKIP() << "this processor (" << CpuModelName() << ") has no " << CpuIsaName(GetParam());
    }
    kernels_ = &cpu::KernelsFor(GetParam());
  }
  const Kernels* kernels_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Isa, ProductTest,
                         testing::Values(CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvxVnni,
                                         CpuIsa::kAvx512, CpuIsa::kAvx512Gfni, CpuIsa::kAmx),
                         IsaTestName);

TEST_P(ProductTest, IsExactForEveryNumberOfTokens) {
  TestRandom random(11);
  for (int32_t tokens = 1; tokens <= 140; ++tokens) {
    const int64_t rows = 4 + random.Below(60);
    const int64_t cols = 1 + random.Below(400);
    ExpectExact(*kernels_, RandomProblem(random, rows, cols, tokens), 0, rows);
  }
}

TEST_P(ProductTest, IsExactForEveryRange) {
  TestRandom random(12);
  for (int32_t tokens : {1, 2, 3, 7, 16, 33, 65}) {
    const Problem problem = RandomProblem(random, 11, 130, tokens);
    for (int64_t begin = 0; begin < 11; ++begin) {
      for (int64_t end = begin + 1; end <= 11; ++end) ExpectExact(*kernels_, problem, begin, end);
    }
  }
}

TEST_P(ProductTest, IsExactForEveryNumberOfColumnBlocks) {
  TestRandom random(13);
  for (int32_t tokens : {1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    for (int64_t cols : {64, 128, 192, 448, 512, 576, 1024, 1088, 2112, 4160}) {
      ExpectExact(*kernels_, RandomProblem(random, 5, cols, tokens), 0, 5);
    }
  }
}

// The widest sums there can be: every partial sum at its extreme, at the most columns that the
// backend takes.
TEST_P(ProductTest, DoesNotOverflowAtTheExtremes) {
  for (int8_t code : {int8_t{-128}, int8_t{127}}) {
    for (int8_t weight : {int8_t{-1}, int8_t{1}}) {
      for (int32_t tokens : {1, 2, 3, 6, 8, 12, 16, 24, 32, 48, 64}) {
        Problem problem = {4, 131072, tokens, {}, {}, {}, {}, {}};
        problem.weights.assign(static_cast<size_t>(4 * problem.cols), weight);
        problem.codes.assign(static_cast<size_t>(tokens * problem.cols), code);
        problem.factors.assign(static_cast<size_t>(tokens), 0.5f);
        problem.initial.assign(size_t{4} * static_cast<size_t>(tokens), 0.0f);
        Pack(problem);
        const float expected =
            static_cast<float>(int32_t{weight} * code * static_cast<int32_t>(problem.cols)) * 0.5f;
        EXPECT_TRUE(SameBits(std::vector<float>(size_t{4} * static_cast<size_t>(tokens), expected),
                             Actual(*kernels_, problem, 0, 4, false)))
            << tokens;
      }
    }
  }
}

}  // namespace
}  // namespace mmfree
