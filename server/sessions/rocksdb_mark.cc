#include "server/sessions/rocksdb_mark.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/sessions/rocksdb_checksum.h"

namespace mmfree {
namespace {

using Content = std::array<uint64_t, 2>;

std::string PathOf(const std::string& directory) {
  return absl::StrCat(directory, "/ACKNOWLEDGED");
}

Content ContentOf(uint64_t sequence) {
  std::array<char, sizeof(sequence)> bytes;
  memcpy(bytes.data(), &sequence, sizeof(sequence));
  return {sequence, RocksDbCrc(absl::string_view(bytes.data(), bytes.size()))};
}

}  // namespace

RocksDbMark::RocksDbMark(const std::string& directory) : path_(PathOf(directory)) {}

RocksDbMark::~RocksDbMark() { Reset(); }

void RocksDbMark::Raise(uint64_t sequence) {
  const absl::MutexLock lock(&mutex_);
  if (sequence <= sequence_) return;
  if (file_ < 0) file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  const Content content = ContentOf(sequence);
  if (file_ < 0 || pwrite(file_, content.data(), sizeof(content), 0) != sizeof(content)) return;
  sequence_ = sequence;
  synced_ = false;
}

void RocksDbMark::Sync() {
  const absl::MutexLock lock(&mutex_);
  if (!synced_ && file_ >= 0) synced_ = fdatasync(file_) == 0;
}

void RocksDbMark::Reset() {
  const absl::MutexLock lock(&mutex_);
  if (file_ >= 0) close(file_);
  file_ = -1;
  sequence_ = 0;
}

uint64_t ReadRocksDbMark(const std::string& directory) {
  const int file = open(PathOf(directory).c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  Content content = {};
  const bool whole = pread(file, content.data(), sizeof(content), 0) == sizeof(content);
  close(file);
  return whole && content == ContentOf(content[0]) ? content[0] : 0;
}

absl::Status RemoveRocksDbMark(const std::string& directory) {
  std::error_code error;
  std::filesystem::remove(PathOf(directory), error);
  if (!error) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("cannot remove ", PathOf(directory), ": ", error.message()));
}

}  // namespace mmfree
