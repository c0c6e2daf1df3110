// Prompts that begin alike are fed once: what the prefix cache holds is not fed again, and what is
// just being fed is waited for.
#ifndef MMFREE_SERVER_SCHEDULER_PREFIX_SHARING_H_
#define MMFREE_SERVER_SCHEDULER_PREFIX_SHARING_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/metrics/metrics.h"
#include "server/prefix_cache/prefix_cache.h"
#include "server/prefix_cache/radix_tree.h"
#include "server/scheduler/request_state.h"

namespace mmfree {

// Decides where a prompt starts, at which of its positions the state is kept, and which other
// prompt it waits for (decisions/0511). It waits only for one that is being fed, shares at least
// kLeastGain more tokens with it than the cache knows, is at least as far, and is not of a lower
// class or rank; and the turn of that one is that of a prompt which ends where the nearest waiter
// wants to start (`awaited`). So whoever it waits for is not served after it. When that one ends or
// loses its slot, those that waited go on from the last state there is: the first of them feeds,
// the others wait for it.
//
// The step thread's; no locks of its own.
class PrefixSharing {
 public:
  // A state is kept where it saves at least so many tokens.
  static constexpr int64_t kLeastGain = 16;

  struct Options {
    PrefixCache* cache = nullptr;  // null: nothing is shared
    std::string model_digest;
    int64_t interval = 256;  // also keep the state after each multiple of this; 0: no
  };

  // The options' cache and `metrics` must outlive this.
  PrefixSharing(Options options, ModelMetrics* metrics);

  // The prompt's space; empty when it takes no part: it does not start at the start of a context,
  // each of its tokens has to be scored, or it is too short. Thread-safe.
  std::string SpaceOf(const GenerationRequest& request) const;
  // Tokens of the prompt that need not be fed if it starts now. Thread-safe.
  int64_t Peek(absl::string_view space, absl::Span<const int32_t> prompt) const;

  // The request has a slot and starts, or has been released: sets fed, initial_state and
  // chunk_boundary, or `held` when it is to wait, and then `awaited` of prefix.joined.
  void Prepare(RequestState* request);

  // Whether the state of the request's slot is to be given to AddState before it is fed further.
  static bool WantsState(const RequestState& request) {
    const std::vector<int64_t>& checkpoints = request.prefix.checkpoints;
    return !checkpoints.empty() && checkpoints.back() == request.fed;
  }
  // The state after request->fed tokens; null when it could not be read. Sets `awaited` anew.
  void AddState(RequestState* request, const SharedState& state);

  // The request has ended or lost its slot: it neither waits nor is waited for. One that was held
  // stays so, and is to be prepared again when it gets a slot.
  void Leave(RequestState* request);

  // Those that were held and are not to wait for whom they waited for any longer, in the order in
  // which they came: to be prepared, before the next step is planned.
  std::vector<RequestState*> TakeReleased();

 private:
  // The requests that are being fed, at the nodes of their prompts.
  struct Feeds {
    std::vector<RequestState*> requests;
    bool empty() const { return requests.empty(); }
  };
  using Tree = RadixTree<Feeds>;

  static absl::Span<const int32_t> Prefix(const RequestState& request);
  // Whom to wait for when `known` tokens need not be fed; null for nobody. `common`: of its tokens,
  // those it shares with any prompt that is being fed, or 0.
  RequestState* FindFeed(const RequestState& request, int64_t known, int64_t* shared,
                         int64_t* common);
  void Join(RequestState* request, RequestState* feed, int64_t known, int64_t shared);
  std::vector<int64_t> PlanCheckpoints(int64_t known, int64_t common, int64_t end) const;
  static void SetAwaited(RequestState* feed);
  void StartFeeding(RequestState* request);
  void StopFeeding(RequestState* request);
  void Release(RequestState* feed, int64_t position, const SharedState& state);

  const Options options_;
  ModelMetrics* const metrics_;
  absl::flat_hash_map<std::string, std::unique_ptr<Tree>> feeds_;  // by space
  std::vector<RequestState*> released_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_PREFIX_SHARING_H_
