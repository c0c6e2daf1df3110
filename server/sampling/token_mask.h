// A set of token ids, one bit each.
#ifndef MMFREE_SERVER_SAMPLING_TOKEN_MASK_H_
#define MMFREE_SERVER_SAMPLING_TOKEN_MASK_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace mmfree {

// Ids in [0, size()). Copies are independent; concurrent reads are safe.
class TokenMask {
 public:
  TokenMask() = default;
  // `allowed`: whether the set starts full or empty.
  TokenMask(int64_t size, bool allowed)
      : size_(size), words_(static_cast<size_t>((size + 63) / 64), allowed ? ~uint64_t{0} : 0) {
    if (allowed && size % 64 != 0) words_.back() = (uint64_t{1} << (size % 64)) - 1;
  }

  int64_t size() const { return size_; }
  bool Has(int32_t id) const { return ((words_[Word(id)] >> (id & 63)) & 1) != 0; }
  void Add(int32_t id) { words_[Word(id)] |= uint64_t{1} << (id & 63); }
  void Remove(int32_t id) { words_[Word(id)] &= ~(uint64_t{1} << (id & 63)); }
  // Keeps what is in `other`, too, which has the same size.
  void Intersect(const TokenMask& other) {
    for (size_t i = 0; i < words_.size(); ++i) words_[i] &= other.words_[i];
  }

  // The lowest id of the set; -1 when it is empty.
  int32_t First() const {
    for (size_t i = 0; i < words_.size(); ++i) {
      if (words_[i] != 0) return static_cast<int32_t>(64 * i) + std::countr_zero(words_[i]);
    }
    return -1;
  }
  int64_t Count() const {
    int64_t count = 0;
    for (const uint64_t word : words_) count += std::popcount(word);
    return count;
  }

  // Bit id % 64 of word id / 64; bits from size() on are not set.
  absl::Span<const uint64_t> words() const { return words_; }

  // Calls f(id) for each id that is not in the set, in rising order.
  template <typename F>
  void ForEachMissing(F f) const {
    for (size_t i = 0; i < words_.size(); ++i) {
      uint64_t missing = ~words_[i];
      if (64 * (static_cast<int64_t>(i) + 1) > size_) missing &= (uint64_t{1} << (size_ % 64)) - 1;
      for (; missing != 0; missing &= missing - 1) {
        f(static_cast<int32_t>(64 * i) + std::countr_zero(missing));
      }
    }
  }

 private:
  static size_t Word(int32_t id) { return static_cast<size_t>(id) >> 6; }

  int64_t size_ = 0;
  std::vector<uint64_t> words_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_TOKEN_MASK_H_
