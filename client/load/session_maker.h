// Makes many sessions on a server, for runs whose streams are turns of them.
#ifndef MMFREE_CLIENT_LOAD_SESSION_MAKER_H_
#define MMFREE_CLIENT_LOAD_SESSION_MAKER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/load/histogram.h"
#include "client/load/workload.h"
#include "mmfree/v1/session.grpc.pb.h"

namespace mmfree {

// Not thread-safe.
struct SessionReport {
  absl::Duration elapsed;
  int64_t created = 0;
  std::map<std::string, int64_t> errors;  // of those that were not, by gRPC code
  Histogram create;                       // of those that were
  int64_t checkpoint_bytes = 0;           // what the server says that it keeps of one
  int64_t state_bytes = 0;                // of the model
  // Resident memory of the server before and after; 0: not known.
  int64_t memory_before = 0;
  int64_t memory_after = 0;

  int64_t memory_per_session() const {
    return memory_before > 0 && created > 0 ? (memory_after - memory_before) / created : 0;
  }
};

// For people: some lines.
std::string ToText(const SessionReport& report);
// One compact object; times in seconds.
std::string ToJson(const SessionReport& report);

// Resident memory of a process of this machine without what is mapped from files, in bytes; 0 when
// it cannot be read.
int64_t ResidentBytes(int64_t pid);

// One run of CreateSession calls, `concurrency` at once: SessionId(0) to SessionId(count - 1), each
// with prompt_tokens random tokens. Calls run on gRPC's threads; Run blocks.
class SessionMaker {
 public:
  SessionMaker(const WorkloadOptions& workload, int64_t count, int64_t concurrency,
               std::vector<std::unique_ptr<v1::SessionService::Stub>> stubs);

  // Without state_bytes and the memory, which are the caller's to know.
  SessionReport Run();

 private:
  struct Call;

  void StartNext();
  void Ended(const Call& call, const grpc::Status& status);

  const WorkloadOptions workload_;
  const int64_t count_;
  const int64_t concurrency_;
  const std::vector<std::unique_ptr<v1::SessionService::Stub>> stubs_;

  absl::Mutex mutex_;
  int64_t started_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t running_ ABSL_GUARDED_BY(mutex_) = 0;
  SessionReport report_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mmfree

#endif  // MMFREE_CLIENT_LOAD_SESSION_MAKER_H_
