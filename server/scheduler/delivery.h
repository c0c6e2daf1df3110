// The way from the step thread to the streams: tokens are handed over in one batch a step, and
// threads of this class call the sinks.
#ifndef MMFREE_SERVER_SCHEDULER_DELIVERY_H_
#define MMFREE_SERVER_SCHEDULER_DELIVERY_H_

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/scheduler/request_state.h"

namespace mmfree {

// A request belongs to one delivery thread (by its id), so its sink's calls are in order and never
// concurrent. When a thread falls behind, the tokens of several steps reach a sink in one call.
// Add* and Publish are the step thread's; WaitForEnds is thread-safe.
class Delivery {
 public:
  // At least one thread.
  explicit Delivery(int num_threads);
  // Delivers what was published, then joins.
  ~Delivery();
  Delivery(const Delivery&) = delete;
  Delivery& operator=(const Delivery&) = delete;

  // Next in the batch: a token of a generation.
  void AddToken(RequestState* request, const SampledToken& token) {
    outgoing_[request->id % outgoing_.size()].push_back({request, token, /*end=*/false});
  }
  // Next in the batch: the request's end, with what its status and result say. It may be used until
  // Publish.
  void AddEnd(std::unique_ptr<RequestState> request);

  // Hands the batch over: one lock for each thread that has something in it.
  void Publish();

  // Blocks until `count` ends have been delivered in all.
  void WaitForEnds(int64_t count);

 private:
  struct Event {
    RequestState* request;  // owned by the event when `end`
    SampledToken token;
    bool end;
  };

  struct Shard {
    absl::Mutex mutex;
    std::vector<Event> pending ABSL_GUARDED_BY(mutex);
    bool stopping ABSL_GUARDED_BY(mutex) = false;
    std::thread thread;
  };

  void Run(Shard* shard);

  absl::Mutex ends_mutex_;
  int64_t ends_ ABSL_GUARDED_BY(ends_mutex_) = 0;  // delivered

  std::vector<std::vector<Event>> outgoing_;  // by shard
  std::vector<std::unique_ptr<Shard>> shards_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_DELIVERY_H_
