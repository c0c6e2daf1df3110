// Several score requests that succeed or fail as one.
#ifndef MMFREE_SERVER_RPC_SCORE_JOIN_H_
#define MMFREE_SERVER_RPC_SCORE_JOIN_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "mmfree/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/scheduler/request.h"

namespace mmfree {

// The first error cancels the others. `done` is called once, when the engine has let go of every
// request, with that error or OK; the response is then complete. Thread-safe.
class ScoreJoin : public std::enable_shared_from_this<ScoreJoin> {
 public:
  // `engine` and `response` outlive the call of `done`.
  ScoreJoin(Engine* engine, v1::ScoreResponse* response, std::function<void(absl::Status)> done);

  // Submits the requests in order; once per object, not empty.
  void Start(std::vector<ScoreRequest> requests);

  // Cancels what runs and what is not submitted yet. The final error is then `status`.
  void Cancel(const absl::Status& status);

 private:
  class Sink;

  void OnScored(size_t index, absl::StatusOr<ScoreResult> result);
  // One of the requests, or their submission, is over.
  void Release(const absl::Status& status);

  Engine* const engine_;
  v1::ScoreResponse* const response_;
  const std::function<void(absl::Status)> done_;

  absl::Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::vector<RequestHandle> handles_ ABSL_GUARDED_BY(mu_);
  // Requests the engine holds, and one for Start while it submits.
  size_t outstanding_ ABSL_GUARDED_BY(mu_) = 1;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_SCORE_JOIN_H_
