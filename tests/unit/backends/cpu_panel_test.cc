#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/panel.h"

namespace mmfree::cpu {
namespace {

// Tables are only looked at, so each can be tested on every processor.
std::vector<const Kernels*> AllKernels() {
#if defined(__x86_64__)
  return {&ScalarKernels(), &Avx2Kernels(), &Avx512Kernels(), &GfniKernels(), &AmxKernels()};
#else
  return {&ScalarKernels()};
#endif
}

TEST(PanelLayoutTest, EveryCodeHasAByteOfItsOwnWithinThePanel) {
  for (const Kernels* kernels : AllKernels()) {
    for (int32_t tokens = 0; tokens <= 200; ++tokens) {
      constexpr int64_t kCols = 128;
      PanelLayout layout;
      layout.Set(*kernels, tokens, kCols);
      EXPECT_LE(layout.bytes(), PanelLayout::MaxBytes(*kernels, tokens, kCols));
      std::vector<int8_t> panel(static_cast<size_t>(layout.bytes()));
      std::vector<bool> used(panel.size());
      for (int32_t token = 0; token < tokens; ++token) {
        const CodePlace place = layout.Place(panel.data(), token);
        for (int64_t k = 0; k < kCols; ++k) {
          const int64_t at =
              place.codes + k / place.chunk * place.stride + k % place.chunk - panel.data();
          ASSERT_GE(at, 0);
          ASSERT_LT(at, layout.bytes());
          ASSERT_FALSE(used[static_cast<size_t>(at)]) << kernels->name << " token " << token;
          used[static_cast<size_t>(at)] = true;
        }
      }
    }
  }
}

TEST(PanelLayoutTest, TilesCoverTheTokensInOrderWithTheSmallestShapeThatHoldsTheRest) {
  for (const Kernels* kernels : AllKernels()) {
    const TileShape& largest = kernels->shapes[kernels->num_shapes - 1];
    const int32_t capacity = largest.per_vector * largest.vectors;
    EXPECT_LE(capacity, kMaxTileTokens);
    for (int32_t tokens = 1; tokens <= 200; ++tokens) {
      PanelLayout layout;
      layout.Set(*kernels, tokens, 64);
      int32_t next = 0;
      for (const Tile& tile : layout.tiles()) {
        EXPECT_EQ(tile.first, next);
        next += tile.count;
        if (next < tokens) {
          EXPECT_EQ(tile.count, capacity);
        }
        EXPECT_LE(tile.count, tile.shape.per_vector * tile.shape.vectors);
      }
      EXPECT_EQ(next, tokens);
    }
  }
}

}  // namespace
}  // namespace mmfree::cpu
