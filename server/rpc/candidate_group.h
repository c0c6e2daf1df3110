// A Generate of several candidates: one prompt, fed once, and a stream for each continuation.
#ifndef MMFREE_SERVER_RPC_CANDIDATE_GROUP_H_
#define MMFREE_SERVER_RPC_CANDIDATE_GROUP_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "mmfree/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/rpc/generation_stream.h"
#include "server/scheduler/request.h"

namespace mmfree {

// First a request that only feeds the prompt, and hands back the state before its last token; then
// a request for each candidate that goes on from there (decisions/0310). Their streams write in
// turns, one event each. The first error ends the RPC and cancels the other candidates; the RPC
// ends when all of them have let go of the engine.
//
// Thread-safe. Held by the transport; the streams, which the engine may hold longer, do not touch
// it after their ends.
class CandidateGroup final : public EventSource,
                             public std::enable_shared_from_this<CandidateGroup> {
 public:
  // Prepares the request of a candidate, which goes on from `after_prompt`, and gives what its
  // stream writes to instead of `out`; null: `out`. Called for one after the other.
  using Prepare = std::function<std::unique_ptr<EventWriter>(
      const FinalState& after_prompt, GenerationRequest* request, EventWriter* out)>;

  // `request` and `options` are those of candidate 0 if it were alone; final_state is ignored.
  // `prepare` may be null. `engine` and `writer` outlive the RPC.
  CandidateGroup(uint32_t candidates, GenerationStream::Options options, Engine* engine,
                 GenerationRequest request, EventWriter* writer, Prepare prepare = nullptr);

  // Submits the prompt. On an error the RPC is finished with it.
  void Start();

  void OnWriteDone(bool ok) override;
  void OnCancel(bool deadline_passed) override;

 private:
  // What one of the streams takes for its transport.
  class Lane final : public EventWriter {
   public:
    explicit Lane(CandidateGroup* group) : group_(group) {}
    void Write(const v1::GenerateResponse& event) override;
    void WriteLast(const v1::GenerateResponse& event) override;
    void Finish(const absl::Status& status) override;

    std::unique_ptr<EventWriter> before;  // what `stream` writes to; null: to this
    std::shared_ptr<GenerationStream> stream;
    const v1::GenerateResponse* event = nullptr;  // waits or is in flight
    bool last = false;                            // `event` is the stream's last

   private:
    CandidateGroup* const group_;
    v1::GenerateResponse finished_;
  };

  GenerationRequest PromptRequest() const;
  GenerationRequest CandidateRequest(uint32_t candidate) const;
  // `prompt`: what the end of the prompt's request says.
  void StartCandidates(const v1::GenerationFinished& prompt);
  void Enqueue(Lane* lane, const v1::GenerateResponse& event, bool last);
  // Writes what waits unless a write is in flight.
  void Send();
  // The event in flight was taken, or lost when not `ok`.
  void Complete(Lane* lane, bool ok);
  // A stream has ended with an error.
  void Fail(const absl::Status& status);
  // Ends the RPC when all streams have ended.
  void EndIfAllEnded();
  std::vector<std::shared_ptr<GenerationStream>> Streams() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const uint32_t candidates_;
  const GenerationStream::Options options_;
  Engine* const engine_;
  const GenerationRequest request_;
  EventWriter* const writer_;
  const Prepare prepare_;
  const std::shared_ptr<FinalState> prompt_state_ = std::make_shared<FinalState>();
  Lane prompt_lane_;
  // Set before the first candidate is submitted, and not changed afterwards.
  v1::GenerationFinished prompt_finished_;

  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<Lane>> lanes_ ABSL_GUARDED_BY(mu_);  // empty while the prompt is fed
  std::deque<Lane*> waiting_ ABSL_GUARDED_BY(mu_);                 // with an event to write
  Lane* writing_ ABSL_GUARDED_BY(mu_) = nullptr;                   // its event is in flight
  uint32_t open_ ABSL_GUARDED_BY(mu_) = 1;                         // streams that have not ended
  bool client_gone_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);  // the first error
  bool ended_ ABSL_GUARDED_BY(mu_) = false;   // the writer is not used any more
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_CANDIDATE_GROUP_H_
