#include "server/backends/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>

namespace mmfree::cpu {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);

// Tells the core that this is a spin loop.
void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Best effort: without it the threads still compute the same.
void BindToProcessor(int index) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  const int count = CPU_COUNT(&allowed);
  if (count == 0) return;
  int skip = index % count;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || skip-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
    return;
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads, bool pin) {
  workers_.reserve(threads - 1);
  for (int index = 1; index < threads; ++index) {
    workers_.emplace_back([this, index, pin] { WorkerLoop(index, pin); });
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  run_.value.fetch_add(1, std::memory_order_release);
  run_.value.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::WaitWhile(const Word& word, uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.value.load(std::memory_order_acquire) != old) return;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  word.value.wait(old, std::memory_order_acquire);
}

void ThreadPool::Barrier() {
  if (workers_.empty()) return;
  const uint32_t generation = barrier_generation_.value.load(std::memory_order_acquire);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) == workers_.size()) {
    arrived_.value.store(0, std::memory_order_relaxed);
    barrier_generation_.value.fetch_add(1, std::memory_order_release);
    barrier_generation_.value.notify_all();
    return;
  }
  WaitWhile(barrier_generation_, generation);
}

void ThreadPool::Run(absl::FunctionRef<void(int)> task) {
  task_ = &task;
  if (!workers_.empty()) {
    run_.value.fetch_add(1, std::memory_order_release);
    run_.value.notify_all();
  }
  task(0);
  Barrier();  // all parts are done
}

void ThreadPool::WorkerLoop(int index, bool pin) {
  if (pin) BindToProcessor(index);
  for (uint32_t seen = 0;; ++seen) {
    WaitWhile(run_, seen);
    if (stop_) return;
    (*task_)(index);
    Barrier();
  }
}

}  // namespace mmfree::cpu
