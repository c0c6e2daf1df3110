// Drives a server: starts streams, reads them, and measures.
#ifndef MMFREE_CLIENT_LOAD_GENERATOR_H_
#define MMFREE_CLIENT_LOAD_GENERATOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/load/report.h"
#include "client/load/workload.h"
#include "mmfree/v1/inference.grpc.pb.h"

namespace mmfree {

struct GeneratorOptions {
  // Closed loop: so many streams at once; as one ends the next starts. Open loop (rate > 0):
  // streams start at random moments, `rate` a second on average, whatever becomes of the others.
  int64_t concurrency = 1;
  double rate = 0;
  // The run starts no more streams after either; what runs then is read to its end.
  int64_t requests = 100;
  absl::Duration duration = absl::InfiniteDuration();
  absl::Duration timeout = absl::InfiniteDuration();  // deadline of each request
  absl::Duration slow_read_delay = absl::Milliseconds(100);
  // Closed loop: before the stream that follows one that failed.
  absl::Duration failure_delay = absl::Milliseconds(100);
  bool progress = false;  // a line a second on stderr
};

// One run. Streams live on gRPC's threads; Run blocks.
class Generator {
 public:
  // Connections to one server, over which the streams are spread.
  Generator(const GeneratorOptions& options, const WorkloadOptions& workload,
            std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs);
  ~Generator();

  Report Run();

 private:
  class Stream;

  bool MayStart() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The number of the next stream, which counts as running from now on; -1 when the run is over.
  int64_t TakeNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Starts a stream that was taken, after `delay`; nothing for -1.
  void Start(int64_t index, absl::Duration delay);
  void StartNext();
  void Ended(const Stream& stream, const grpc::Status& status);
  void PrintProgress(absl::Duration since_last, int64_t tokens_before);

  const GeneratorOptions options_;
  const WorkloadOptions workload_;
  const std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs_;

  absl::Mutex mutex_;
  absl::Time begin_ ABSL_GUARDED_BY(mutex_);
  int64_t running_ ABSL_GUARDED_BY(mutex_) = 0;
  Report report_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_CLIENT_LOAD_GENERATOR_H_
