#include "server/model/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

absl::StatusOr<Region> Region::Allocate(int64_t bytes, Pages pages) {
  Region region;
  region.writable_ = true;
  if (bytes <= 0) return region;
  // One huge page more than asked for, so that the data can start at one.
  const size_t mapping_bytes = static_cast<size_t>(bytes) + kHugePage;
  void* const mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  region.mapping_ = mapping;
  region.mapping_bytes_ = mapping_bytes;
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapping);
  region.data_ = static_cast<uint8_t*>(mapping) + (-start & (kHugePage - 1));
  region.size_ = bytes;
  // A hint: with other pages the memory works the same, only slower.
  (void)madvise(region.data_, static_cast<size_t>(bytes),
                pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return region;
}

absl::StatusOr<Region> Region::MapFile(const std::string& path) {
  // O_NONBLOCK: opening a named pipe must not hang.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, path);
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat info;
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  Region region;
  if (info.st_size == 0) return region;
  const size_t bytes = static_cast<size_t>(info.st_size);
  void* const mapping = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": mmap"));
  region.mapping_ = mapping;
  region.mapping_bytes_ = bytes;
  region.data_ = static_cast<uint8_t*>(mapping);
  region.size_ = info.st_size;
  return region;
}

Region::Region(Region&& other) noexcept { *this = std::move(other); }

Region& Region::operator=(Region&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(writable_, other.writable_);
  return *this;
}

Region::~Region() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

void GiveBack(absl::Span<const uint8_t> bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Up to the first whole page.
  const size_t skipped = (page - reinterpret_cast<uintptr_t>(bytes.data()) % page) % page;
  if (bytes.size() < skipped + page) return;
  const size_t length = (bytes.size() - skipped) / page * page;
  (void)madvise(const_cast<uint8_t*>(bytes.data()) + skipped, length, MADV_DONTNEED);
}

}  // namespace mmfree
