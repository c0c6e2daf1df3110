// Which token masks are on the device, and where. Host code only.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_MASK_CACHE_H_
#define MMFREE_SERVER_BACKENDS_CUDA_MASK_CACHE_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "server/sampling/token_mask.h"

namespace mmfree::cuda {

// Places for `capacity` masks. A mask is known by its object, which a place keeps alive. Not
// thread-safe.
class MaskCache {
 public:
  explicit MaskCache(int32_t capacity) : places_(static_cast<size_t>(capacity)) {}

  static constexpr int32_t kFull = -1;

  struct Found {
    int32_t place = kFull;
    bool is_new = false;  // the place has to be filled
  };

  // The places asked for from now on stay as they are until the next call.
  void BeginStep() { ++step_; }

  // The mask's place: its own, or that of one not used in this step, those last used longest ago
  // among the first. kFull: all of them are in use, or it would be new and `may_add` is false.
  Found Find(const std::shared_ptr<const TokenMask>& mask, bool may_add) {
    if (const auto it = by_mask_.find(mask.get()); it != by_mask_.end()) {
      places_[it->second].last_use = step_;
      return {it->second, false};
    }
    if (!may_add) return {};
    const auto capacity = static_cast<int32_t>(places_.size());
    // A second chance for what was used since the hand came by.
    for (int32_t tries = 0; tries < 2 * capacity; ++tries) {
      const int32_t at = hand_;
      hand_ = (hand_ + 1) % capacity;
      Place& place = places_[at];
      if (place.mask != nullptr && place.last_use == step_) continue;
      if (place.mask != nullptr && place.last_use > place.last_pass) {
        place.last_pass = step_;
        continue;
      }
      if (place.mask != nullptr) by_mask_.erase(place.mask.get());
      place = {mask, step_, step_};
      by_mask_[mask.get()] = at;
      return {at, true};
    }
    return {};
  }

 private:
  struct Place {
    std::shared_ptr<const TokenMask> mask;
    uint64_t last_use = 0;
    uint64_t last_pass = 0;  // of the hand
  };

  std::vector<Place> places_;
  absl::flat_hash_map<const TokenMask*, int32_t> by_mask_;
  int32_t hand_ = 0;
  uint64_t step_ = 1;
};

}  // namespace mmfree::cuda

#endif  // MMFREE_SERVER_BACKENDS_CUDA_MASK_CACHE_H_
