// Buffers of checkpoints, used again.
#ifndef MMFREE_SERVER_SESSIONS_BUFFER_POOL_H_
#define MMFREE_SERVER_SESSIONS_BUFFER_POOL_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace mmfree {

// Every turn makes a checkpoint and lets go of another, a few bytes smaller. Given back to malloc
// each time, their places fill with other things that live long, and a server's memory grows by a
// third. Thread-safe; the buffers may outlive the pool.
class BufferPool {
 public:
  // What it keeps of those that are free, at most.
  static constexpr size_t kMaxFree = 64;

  // A string of its own with room for `size` bytes, empty, which comes back to the pool when the
  // last pointer to it goes.
  std::shared_ptr<std::string> Take(size_t size) {
    std::unique_ptr<std::string> buffer = free_->Pop(size);
    if (buffer == nullptr) {
      buffer = std::make_unique<std::string>();
      buffer->reserve((size + kStep - 1) / kStep * kStep);
    }
    return {buffer.release(), [free = free_](std::string* used) { free->Push(used); }};
  }

 private:
  static constexpr size_t kStep = 512;  // checkpoints grow: room for some turns

  class FreeList {
   public:
    // Null when none has room for `size` bytes and little more.
    std::unique_ptr<std::string> Pop(size_t size) {
      absl::MutexLock lock(&mutex_);
      for (size_t i = buffers_.size(); i-- > 0;) {
        if (buffers_[i]->capacity() < size || buffers_[i]->capacity() > size + 2 * kStep) continue;
        std::swap(buffers_[i], buffers_.back());
        std::unique_ptr<std::string> buffer = std::move(buffers_.back());
        buffers_.pop_back();
        return buffer;
      }
      return nullptr;
    }
    void Push(std::string* used) {
      std::unique_ptr<std::string> buffer(used);
      buffer->clear();
      absl::MutexLock lock(&mutex_);
      if (buffers_.size() < kMaxFree) {
        buffers_.push_back(std::move(buffer));
      } else {
        // The oldest sizes give way to the newest.
        std::swap(buffers_[next_++ % kMaxFree], buffer);
      }
    }

   private:
    absl::Mutex mutex_;
    std::vector<std::unique_ptr<std::string>> buffers_ ABSL_GUARDED_BY(mutex_);
    size_t next_ ABSL_GUARDED_BY(mutex_) = 0;
  };

  const std::shared_ptr<FreeList> free_ = std::make_shared<FreeList>();
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_BUFFER_POOL_H_
