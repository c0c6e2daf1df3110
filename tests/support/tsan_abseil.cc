// ThreadSanitizer sees the happens-before edges of absl::Mutex, and of what an absl::Status counts,
// only when Abseil itself is built with it. The distribution's library is not, so every guarded
// access would be reported as a race. This file, linked into every program of a ThreadSanitizer
// build, puts itself in front of the library's functions and tells the sanitizer what they do; the
// library still does it.
//
// Between a pre_ and its post_ call the sanitizer ignores the thread's accesses, which covers the
// conditions that the library evaluates on behalf of waiting threads.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace {

// The next definition of a symbol, past this program's own.
template <typename Function>
Function* Next(const char* symbol) {
  void* const found = dlsym(RTLD_NEXT, symbol);
  if (found == nullptr) {
    fprintf(stderr, "tsan_abseil.cc: no %s: it is written for Debian's Abseil 20220623\n", symbol);
    abort();
  }
  return reinterpret_cast<Function*>(found);
}

// The library calls some of its own functions through the symbols that this file stands in front
// of: only the outermost call is told to the sanitizer.
thread_local int depth = 0;

class Locking {
 public:
  Locking(absl::Mutex* mutex, unsigned flags) : mutex_(mutex), flags_(flags) {
    if (depth++ == 0) __tsan_mutex_pre_lock(mutex_, flags_);
  }
  ~Locking() {
    if (--depth == 0) __tsan_mutex_post_lock(mutex_, flags_, 0);
  }
  void Failed() { flags_ |= __tsan_mutex_try_lock_failed; }

 private:
  absl::Mutex* const mutex_;
  unsigned flags_;
};

class Unlocking {
 public:
  Unlocking(absl::Mutex* mutex, unsigned flags) : mutex_(mutex), flags_(flags) {
    if (depth++ == 0) __tsan_mutex_pre_unlock(mutex_, flags_);
  }
  ~Unlocking() {
    if (--depth == 0) __tsan_mutex_post_unlock(mutex_, flags_);
  }

 private:
  absl::Mutex* const mutex_;
  const unsigned flags_;
};

// A call that waits with the mutex held gives it up and takes it again.
class Waiting {
 public:
  explicit Waiting(absl::Mutex* mutex) : mutex_(mutex) {
    if (depth++ > 0) return;
    __tsan_mutex_pre_unlock(mutex_, 0);
    __tsan_mutex_post_unlock(mutex_, 0);
    __tsan_mutex_pre_lock(mutex_, 0);
  }
  ~Waiting() {
    if (--depth == 0) __tsan_mutex_post_lock(mutex_, 0, 0);
  }

 private:
  absl::Mutex* const mutex_;
};

// The sanitizer looks for cycles of locks itself. The library's search keeps its graph under a lock
// that the sanitizer does not see.
[[maybe_unused]] const bool kSearchIsOff = [] {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return true;
}();

// Set as the process exits, before what the libraries destroy then: absl::ParseCommandLine exits
// with a mutex of its own held.
bool exiting = false;
[[maybe_unused]] const int kTellsOfExit = std::atexit([] { exiting = true; });

constexpr unsigned kRead = __tsan_mutex_read_lock;
constexpr unsigned kTry = __tsan_mutex_try_lock;

}  // namespace

#define MMFREE_NEXT(symbol, ...) \
  static auto* const next = Next<std::remove_pointer_t<__VA_ARGS__>>("_ZN4absl7debian3" symbol)

namespace absl {
ABSL_NAMESPACE_BEGIN

Mutex::~Mutex() {
  MMFREE_NEXT("5MutexD1Ev", void (*)(Mutex*));
  if (!exiting) __tsan_mutex_destroy(this, 0);
  next(this);
}

void Mutex::Lock() {
  MMFREE_NEXT("5Mutex4LockEv", void (*)(Mutex*));
  const Locking locking(this, 0);
  next(this);
}

void Mutex::Unlock() {
  MMFREE_NEXT("5Mutex6UnlockEv", void (*)(Mutex*));
  const Unlocking unlocking(this, 0);
  next(this);
}

bool Mutex::TryLock() {
  MMFREE_NEXT("5Mutex7TryLockEv", bool (*)(Mutex*));
  Locking locking(this, kTry);
  const bool locked = next(this);
  if (!locked) locking.Failed();
  return locked;
}

void Mutex::ReaderLock() {
  MMFREE_NEXT("5Mutex10ReaderLockEv", void (*)(Mutex*));
  const Locking locking(this, kRead);
  next(this);
}

void Mutex::ReaderUnlock() {
  MMFREE_NEXT("5Mutex12ReaderUnlockEv", void (*)(Mutex*));
  const Unlocking unlocking(this, kRead);
  next(this);
}

void Mutex::LockWhen(const Condition& condition) {
  MMFREE_NEXT("5Mutex8LockWhenERKNS0_9ConditionE", void (*)(Mutex*, const Condition&));
  const Locking locking(this, 0);
  next(this, condition);
}

bool Mutex::LockWhenWithTimeout(const Condition& condition, Duration timeout) {
  MMFREE_NEXT("5Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE",
              bool (*)(Mutex*, const Condition&, Duration));
  const Locking locking(this, 0);
  return next(this, condition, timeout);
}

bool Mutex::ReaderLockWhenWithTimeout(const Condition& condition, Duration timeout) {
  MMFREE_NEXT("5Mutex25ReaderLockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE",
              bool (*)(Mutex*, const Condition&, Duration));
  const Locking locking(this, kRead);
  return next(this, condition, timeout);
}

bool Mutex::LockWhenWithDeadline(const Condition& condition, Time deadline) {
  MMFREE_NEXT("5Mutex20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE",
              bool (*)(Mutex*, const Condition&, Time));
  const Locking locking(this, 0);
  return next(this, condition, deadline);
}

void Mutex::Await(const Condition& condition) {
  MMFREE_NEXT("5Mutex5AwaitERKNS0_9ConditionE", void (*)(Mutex*, const Condition&));
  const Waiting waiting(this);
  next(this, condition);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  MMFREE_NEXT("5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE",
              bool (*)(Mutex*, const Condition&, Duration));
  const Waiting waiting(this);
  return next(this, condition, timeout);
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  MMFREE_NEXT("5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE",
              bool (*)(Mutex*, const Condition&, Time));
  const Waiting waiting(this);
  return next(this, condition, deadline);
}

void CondVar::Wait(Mutex* mutex) {
  MMFREE_NEXT("7CondVar4WaitEPNS0_5MutexE", void (*)(CondVar*, Mutex*));
  const Waiting waiting(mutex);
  next(this, mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  MMFREE_NEXT("7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE",
              bool (*)(CondVar*, Mutex*, Duration));
  const Waiting waiting(mutex);
  return next(this, mutex, timeout);
}

// Copies of a status share what the last of them deletes, whichever thread has it.
void Status::UnrefNonInlined(uintptr_t rep) {
  MMFREE_NEXT("6Status15UnrefNonInlinedEm", void (*)(uintptr_t));
  static std::mutex mutexes[64];
  const std::lock_guard lock(mutexes[rep / 16 % 64]);
  next(rep);
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  MMFREE_NEXT("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE",
              bool (*)(CondVar*, Mutex*, Time));
  const Waiting waiting(mutex);
  return next(this, mutex, deadline);
}

ABSL_NAMESPACE_END
}  // namespace absl
