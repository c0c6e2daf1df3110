// What a Generate with best_of sends: nothing of the candidates until all are finished, then the
// best of them.
#ifndef MMFREE_SERVER_RPC_BEST_OF_H_
#define MMFREE_SERVER_RPC_BEST_OF_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "mmfree/v1/inference.pb.h"
#include "server/rpc/generation_stream.h"

namespace mmfree {

// Stands between a CandidateGroup, which it is the writer of, and the transport. Events of the
// input pass; those of the candidates are taken as they come and kept. With the last of them the
// candidates are ranked by cumulative logprob, ties by their number, and the first of the ranking
// are sent one after the other, numbered by their rank (decisions/0420).
//
// Thread-safe. Held by the transport; holds the group.
class BestOf final : public EventWriter,
                     public EventSource,
                     public std::enable_shared_from_this<BestOf> {
 public:
  // `made` candidates of which `sent` are sent, 1 <= sent <= made. Their `finished` events have the
  // cumulative logprob. `writer` outlives the RPC.
  BestOf(uint32_t made, uint32_t sent, EventWriter* writer);

  // The group, before it starts.
  void SetSource(std::shared_ptr<EventSource> source) { source_ = std::move(source); }

  // From the group.
  void Write(const v1::GenerateResponse& event) override;
  void WriteLast(const v1::GenerateResponse& event) override;
  void Finish(const absl::Status& status) override;

  // From the transport.
  void OnWriteDone(bool ok) override;
  void OnCancel(bool deadline_passed) override;

 private:
  struct Candidate {
    std::deque<v1::GenerateResponse> deltas;
    int merged = 0;  // deltas put together into the last of them
    v1::GenerateResponse finished;
  };

  void Keep(const v1::GenerateResponse& event);
  // Tells the group that what it wrote was taken.
  void Acknowledge();
  // Makes output_ of the kept candidates.
  void Rank() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Sends the next of output_, or the end when the client is gone.
  void Send(bool client_gone);

  const uint32_t sent_;
  EventWriter* const writer_;
  std::shared_ptr<EventSource> source_;

  absl::Mutex mu_;
  std::vector<Candidate> candidates_ ABSL_GUARDED_BY(mu_);  // by their number
  // A thread is telling the group; whether there is one more to tell.
  bool acknowledging_ ABSL_GUARDED_BY(mu_) = false;
  bool unacknowledged_ ABSL_GUARDED_BY(mu_) = false;
  bool ranked_ ABSL_GUARDED_BY(mu_) = false;  // from here on the writes are of output_
  bool deadline_passed_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::GenerateResponse> output_ ABSL_GUARDED_BY(mu_);
  v1::GenerateResponse in_flight_;  // of whoever may write
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_BEST_OF_H_
