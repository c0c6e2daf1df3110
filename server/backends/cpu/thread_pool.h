// The threads that compute a step together.
#ifndef MMFREE_SERVER_BACKENDS_CPU_THREAD_POOL_H_
#define MMFREE_SERVER_BACKENDS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "server/backends/cpu/topology.h"

namespace mmfree::cpu {

// Runs one task at a time on all of its threads at once; the task's parts meet at barriers. A
// waiting thread spins for a few tens of microseconds, which bridges the gaps within a step and
// between the steps of a busy server, and then sleeps: an idle pool uses no processor time.
//
// Threads that wait for each other run in turns when the system has two of them on one processor,
// which it may not mend for seconds. So each looks before a task where the others are, and moves
// when it shares a processor and another one, of those it may run on by then, is free. While it
// shares one all the same, as with more threads than processors, it does not spin but yields to
// the other.
//
// Run is for one caller at a time.
class ThreadPool {
 public:
  // `threads` >= 1 counts the caller of Run. They run anywhere. Throws std::system_error, as
  // std::thread does, when the system does not start that many.
  explicit ThreadPool(int threads) : ThreadPool(std::vector<Processors>(threads)) {}
  // One thread for each home: thread i is bound to the processors homes[i], the caller of Run only
  // while it is there. An empty home is no restriction.
  explicit ThreadPool(std::vector<Processors> homes);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(i) for i in [0, size()), each on its own thread (0: the caller's), and returns when
  // all have returned.
  void Run(absl::FunctionRef<void(int)> task);

  // Within a task, on thread `index`: returns once every thread has called it as often.
  void Barrier(int index);

 private:
  // A word that threads wait on, alone in its cache line.
  struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
  };

  // Blocks the thread while `word` holds `old`.
  void WaitWhile(const Word& word, uint32_t old, int index);
  // Notes where the thread is. True when another was there when it last did.
  bool SharesProcessor(int index);
  void WorkerLoop(int index);
  // Ends the workers.
  void Stop();
  // Notes where the thread is, and moves it if need be.
  void Spread(int index);

  Word run_;                 // advances with each task
  Word arrived_;             // threads at the barrier
  Word barrier_generation_;  // advances when a barrier opens
  // Set by the caller before it advances run_; read by the workers after.
  const absl::FunctionRef<void(int)>* task_ = nullptr;
  bool stop_ = false;
  const std::vector<Processors> homes_;
  const Processors allowed_;                  // what an empty home stands for
  std::vector<std::atomic<int>> processors_;  // of each thread as it last began a task or a wait
  std::vector<std::thread> workers_;
};

}  // namespace mmfree::cpu

#endif  // MMFREE_SERVER_BACKENDS_CPU_THREAD_POOL_H_
