// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
// counter-based generator. A draw is a pure function of (key, counter), so the same seed and
// position give the same number on every backend, thread and replica. Thread-safe; host and device.
#ifndef MMFREE_SERVER_BASE_PHILOX_H_
#define MMFREE_SERVER_BASE_PHILOX_H_

#include <cstdint>

#include "server/base/numerics.h"

namespace mmfree {

struct PhiloxBlock {
  uint32_t word[4];
};

// The block at `counter` (four words, least significant first) under `key` (two words).
MMFREE_HOST_DEVICE PhiloxBlock Philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xd2511f53ull * counter.word[0];
    const uint64_t p1 = 0xcd9e8d57ull * counter.word[2];
    PhiloxBlock next;
    next.word[0] = static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0;
    next.word[1] = static_cast<uint32_t>(p1);
    next.word[2] = static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1;
    next.word[3] = static_cast<uint32_t>(p0);
    counter = next;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// 64 uniform bits for draw number `draw` of candidate `candidate` at context position `position`.
MMFREE_HOST_DEVICE uint64_t UniformBits(uint64_t seed, uint64_t position, uint32_t candidate,
                                        uint32_t draw) {
  const PhiloxBlock counter = {
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), candidate, draw}};
  const PhiloxBlock block =
      Philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return block.word[0] | (static_cast<uint64_t>(block.word[1]) << 32);
}

// floor(a * b / 2^64).
MMFREE_HOST_DEVICE uint64_t MulHigh64(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
#endif
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_PHILOX_H_
