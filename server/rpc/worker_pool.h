// Threads for work that is too long for a gRPC thread, such as tokenizing a large prompt.
#ifndef MMFREE_SERVER_RPC_WORKER_POOL_H_
#define MMFREE_SERVER_RPC_WORKER_POOL_H_

#include <cstddef>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace mmfree {

// Thread-safe. Destruction runs what is queued, then joins.
class WorkerPool {
 public:
  // At most `max_queue` tasks wait; at least one thread.
  WorkerPool(int threads, size_t max_queue);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // False when the queue is full; the task is then not run.
  bool Schedule(std::function<void()> task);

 private:
  void Work();

  const size_t max_queue_;
  absl::Mutex mu_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_WORKER_POOL_H_
