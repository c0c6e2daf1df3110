// Memory that a model's weights live in: a file mapped read-only, or anonymous pages.
#ifndef MMFREE_SERVER_MODEL_REGION_H_
#define MMFREE_SERVER_MODEL_REGION_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mmfree {

// Owns the mapping; movable. Page-aligned.
class Region {
 public:
  enum class Pages : uint8_t { kHuge, kSmall };

  // Zeroed private memory, on huge pages where the system grants them, or on small ones.
  // RESOURCE_EXHAUSTED.
  static absl::StatusOr<Region> Allocate(int64_t bytes, Pages pages = Pages::kHuge);

  // Maps a regular file read-only. The file must not be truncated or rewritten in place while
  // mapped (replace it by rename). NOT_FOUND when it does not exist, INVALID_ARGUMENT when it is
  // not a regular file, PERMISSION_DENIED and UNAVAILABLE otherwise. An empty file is an empty
  // span.
  static absl::StatusOr<Region> MapFile(const std::string& path);

  Region() = default;
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  ~Region();

  const uint8_t* data() const { return data_; }
  // Null for a mapped file.
  uint8_t* mutable_data() { return writable_ ? data_ : nullptr; }
  int64_t size() const { return size_; }
  absl::Span<const uint8_t> bytes() const { return {data_, static_cast<size_t>(size_)}; }

 private:
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  bool writable_ = false;
};

// Takes the whole pages of `bytes`, which lie in a file that MapFile mapped, out of resident
// memory; they come back from the file when they are read again. A hint: what fails changes
// nothing.
void GiveBack(absl::Span<const uint8_t> bytes);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_REGION_H_
