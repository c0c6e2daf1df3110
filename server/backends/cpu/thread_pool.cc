#include "server/backends/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <system_error>
#include <utility>

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
void BindTo(const Processors& processors) {
  if (processors.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : processors) {
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

}  // namespace

ThreadPool::ThreadPool(std::vector<Processors> homes)
    : homes_(std::move(homes)),
      allowed_(CoresFirst(AllowedProcessors())),
      processors_(homes_.size()) {
  for (std::atomic<int>& processor : processors_) processor = -1;
  const int threads = static_cast<int>(homes_.size());
  workers_.reserve(threads - 1);
  try {
    for (int index = 1; index < threads; ++index) {
      workers_.emplace_back([this, index] { WorkerLoop(index); });
    }
  } catch (const std::system_error&) {
    Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  stop_ = true;
  run_.value.fetch_add(1, std::memory_order_release);
  run_.value.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::SharesProcessor(int index) {
  std::atomic<int>& own = processors_[static_cast<size_t>(index)];
  const int processor = sched_getcpu();
  // Most often the same: threads that only read what they share do not wait for each other.
  if (own.load(std::memory_order_relaxed) != processor) {
    own.store(processor, std::memory_order_relaxed);
  }
  return std::any_of(processors_.begin(), processors_.end(),
                     [&own, processor](const std::atomic<int>& other) {
                       return &other != &own && other.load(std::memory_order_relaxed) == processor;
                     });
}

void ThreadPool::WaitWhile(const Word& word, uint32_t old, int index) {
  if (word.value.load(std::memory_order_acquire) != old) return;
  const bool shares = SharesProcessor(index);
  const int looks = shares ? 1 : 64;
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    if (shares) sched_yield();
    for (int i = 0; i < looks; ++i) {
      if (word.value.load(std::memory_order_acquire) != old) return;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  word.value.wait(old, std::memory_order_acquire);
}

void ThreadPool::Barrier(int index) {
  if (workers_.empty()) return;
  const uint32_t generation = barrier_generation_.value.load(std::memory_order_acquire);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) == workers_.size()) {
    arrived_.value.store(0, std::memory_order_relaxed);
    barrier_generation_.value.fetch_add(1, std::memory_order_release);
    barrier_generation_.value.notify_all();
    return;
  }
  WaitWhile(barrier_generation_, generation, index);
}

void ThreadPool::Spread(int index) {
  std::atomic<int>& own = processors_[static_cast<size_t>(index)];
  own.store(sched_getcpu(), std::memory_order_relaxed);
  const Processors& home =
      homes_[static_cast<size_t>(index)].empty() ? allowed_ : homes_[static_cast<size_t>(index)];
  const auto shared = [&own](const std::atomic<int>& other) {
    return other.load(std::memory_order_relaxed) == own.load(std::memory_order_relaxed);
  };
  const auto before_own = processors_.begin() + index;
  if (home.size() < 2 || std::none_of(processors_.begin(), before_own, shared)) return;
  // Others may have narrowed it since the thread began, as `taskset -p` does.
  const Processors allowed = AllowedProcessors();
  Processors choice;
  std::copy_if(home.begin(), home.end(), std::back_inserter(choice), [&allowed](int processor) {
    return std::binary_search(allowed.begin(), allowed.end(), processor);
  });
  std::vector<int> current;
  current.reserve(processors_.size());
  for (const std::atomic<int>& processor : processors_) {
    current.push_back(processor.load(std::memory_order_relaxed));
  }
  const int free = FreeProcessor(current, index, choice);
  if (free < 0) return;
  BindTo({free});
  own.store(free, std::memory_order_relaxed);
  BindTo(allowed);
}

void ThreadPool::Run(absl::FunctionRef<void(int)> task) {
  const Processors before = homes_[0].empty() ? Processors() : AllowedProcessors();
  BindTo(homes_[0]);
  processors_[0].store(sched_getcpu(), std::memory_order_relaxed);
  task_ = &task;
  if (!workers_.empty()) {
    run_.value.fetch_add(1, std::memory_order_release);
    run_.value.notify_all();
  }
  task(0);
  Barrier(0);  // all parts are done
  BindTo(before);
}

void ThreadPool::WorkerLoop(int index) {
  BindTo(homes_[static_cast<size_t>(index)]);
  for (uint32_t seen = 0;; ++seen) {
    WaitWhile(run_, seen, index);
    if (stop_) return;
    Spread(index);
    (*task_)(index);
    Barrier(index);
  }
}

}  // namespace mmfree::cpu
