#include "server/base/philox.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <vector>

namespace mmfree {
namespace {

TEST(PhiloxTest, MatchesTheKnownAnswersOfRandom123) {
  struct Case {
    PhiloxBlock counter;
    uint32_t key0, key1;
    PhiloxBlock expected;
  };
  const std::vector<Case> cases = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       0xffffffff,
       0xffffffff,
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Case& c : cases) {
    const PhiloxBlock block = Philox(c.counter, c.key0, c.key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(block.word[i], c.expected.word[i]) << i;
  }
}

TEST(PhiloxTest, UniformBitsUsesEveryBitOfItsArguments) {
  std::set<uint64_t> seen;
  seen.insert(UniformBits(0, 0, 0, 0));
  for (int bit = 0; bit < 64; ++bit) {
    seen.insert(UniformBits(uint64_t{1} << bit, 0, 0, 0));
    seen.insert(UniformBits(0, uint64_t{1} << bit, 0, 0));
  }
  for (int bit = 0; bit < 32; ++bit) {
    seen.insert(UniformBits(0, 0, uint32_t{1} << bit, 0));
    seen.insert(UniformBits(0, 0, 0, uint32_t{1} << bit));
  }
  EXPECT_EQ(seen.size(), 1u + 2 * 64 + 2 * 32);
  // The first two words of the block, little end first.
  EXPECT_EQ(UniformBits(0, 0, 0, 0), 0xe169c58d6627e8d5ull);
}

TEST(PhiloxTest, MulHigh64IsTheUpperHalfOfTheProduct) {
  EXPECT_EQ(MulHigh64(~0ull, ~0ull), ~0ull - 1);
  EXPECT_EQ(MulHigh64(uint64_t{1} << 63, 6), 3u);
  EXPECT_EQ(MulHigh64(~0ull, 1), 0u);
  for (uint32_t draw = 0; draw < 1000; ++draw) {
    const uint64_t a = UniformBits(1, 2, 3, draw);
    const uint64_t b = UniformBits(4, 5, 6, draw);
    // By 32-bit halves.
    const uint64_t al = a & 0xffffffff, ah = a >> 32, bl = b & 0xffffffff, bh = b >> 32;
    const uint64_t mid = ah * bl + ((al * bl) >> 32);
    const uint64_t mid2 = al * bh + (mid & 0xffffffff);
    EXPECT_EQ(MulHigh64(a, b), ah * bh + (mid >> 32) + (mid2 >> 32));
  }
}

}  // namespace
}  // namespace mmfree
