#include "server/scheduler/prefix_sharing.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <utility>

namespace mmfree {
namespace {

// Nodes looked at to find one prompt to wait for: bounds the time when very many begin alike and
// go on differently.
constexpr int kMaxVisits = 64;

void SetChunkBoundary(RequestState* request) {
  const std::vector<int64_t>& checkpoints = request->prefix.checkpoints;
  request->chunk_boundary = checkpoints.empty() ? request->final_boundary() : checkpoints.back();
}

void EraseFrom(std::vector<RequestState*>* list, const RequestState* request) {
  list->erase(std::remove(list->begin(), list->end(), request), list->end());
}

}  // namespace

PrefixSharing::PrefixSharing(Options options, ModelMetrics* metrics)
    : options_(std::move(options)), metrics_(metrics) {}

std::string PrefixSharing::SpaceOf(const GenerationRequest& request) const {
  if (options_.cache == nullptr || request.first_position != 0 ||
      request.initial_state != nullptr || request.device_state != nullptr ||
      request.prompt_logprobs || static_cast<int64_t>(request.prompt.size()) <= kLeastGain) {
    return "";
  }
  return PrefixSpace(options_.model_digest, request.caller, request.cache_salt);
}

int64_t PrefixSharing::Peek(absl::string_view space, absl::Span<const int32_t> prompt) const {
  return space.empty() ? 0 : options_.cache->Peek(space, prompt.first(prompt.size() - 1));
}

// The last token is always fed: what comes after it is sampled from its logits.
absl::Span<const int32_t> PrefixSharing::Prefix(const RequestState& request) {
  return absl::MakeConstSpan(request.tokens).first(static_cast<size_t>(request.prompt_tokens - 1));
}

void PrefixSharing::Prepare(RequestState* request) {
  PrefixState& prefix = request->prefix;
  if (prefix.space.empty()) return;
  if (request->held) Leave(request);
  PrefixCache::Hit hit = options_.cache->Find(prefix.space, Prefix(*request));
  // It may have left the cache since.
  if (prefix.joined_tokens > hit.tokens) {
    hit.tokens = prefix.joined_tokens;
    hit.state = prefix.joined_state;
  }
  int64_t shared = 0;
  int64_t common = 0;
  RequestState* const feed = FindFeed(*request, hit.tokens, &shared, &common);
  if (feed != nullptr) {
    Join(request, feed, hit.tokens, shared);
    return;
  }
  prefix.joined_state.reset();
  request->held = false;
  request->fed = hit.tokens;
  request->initial_state = std::move(hit.state);
  prefix.checkpoints =
      PlanCheckpoints(hit.tokens, std::max(hit.common, common), request->prompt_tokens - 1);
  SetChunkBoundary(request);
  if (!prefix.checkpoints.empty()) StartFeeding(request);
  metrics_->CountPrefixLookup(request->fed, prefix.has_joined);
}

RequestState* PrefixSharing::FindFeed(const RequestState& request, int64_t known, int64_t* shared,
                                      int64_t* common) {
  const auto found = feeds_.find(request.prefix.space);
  if (found == feeds_.end()) return nullptr;
  const Tree::Match match = found->second->Find(Prefix(request));
  *common = match.length;
  int visits = kMaxVisits;
  // From the prompts that share most upwards, in each case all that share so much or more.
  Tree::Node* top = match.below != nullptr ? match.below : match.node;
  for (*shared = match.length; top != nullptr && *shared - known >= kLeastGain;) {
    std::vector<Tree::Node*> nodes = {top};
    while (!nodes.empty() && visits-- > 0) {
      const Tree::Node* const node = nodes.back();
      nodes.pop_back();
      for (RequestState* feed : node->value.requests) {
        if (feed->phase == Phase::kPrefill && !feed->held && feed->rank >= request.rank &&
            feed->priority >= request.priority && feed->fed >= known && feed->fed < *shared) {
          return feed;
        }
      }
      for (const auto& [token, child] : node->children) nodes.push_back(child.get());
    }
    top = top == match.below ? match.node : top->parent;
    if (top != nullptr) *shared = top->length;
  }
  return nullptr;
}

void PrefixSharing::Join(RequestState* request, RequestState* feed, int64_t known, int64_t shared) {
  std::vector<int64_t>& checkpoints = feed->prefix.checkpoints;  // falling
  const auto waited_for = [feed](int64_t position) {
    return std::any_of(
        feed->prefix.joiners.begin(), feed->prefix.joiners.end(),
        [position](const RequestState* joiner) { return joiner->prefix.join_at == position; });
  };
  // One for which others wait will do; one for which nobody waits makes way.
  int64_t at = shared;
  for (const int64_t planned : checkpoints) {
    const bool near = planned <= shared && planned > shared - kLeastGain;
    if (near && planned - known >= kLeastGain && waited_for(planned)) at = planned;
  }
  checkpoints.erase(std::remove_if(checkpoints.begin(), checkpoints.end(),
                                   [&](int64_t planned) {
                                     return std::abs(planned - at) < kLeastGain && planned != at &&
                                            !waited_for(planned);
                                   }),
                    checkpoints.end());
  const auto place = std::lower_bound(checkpoints.begin(), checkpoints.end(), at, std::greater<>());
  if (place == checkpoints.end() || *place != at) checkpoints.insert(place, at);
  request->prefix.join_at = at;
  SetChunkBoundary(feed);
  request->held = true;
  request->prefix.joined = feed;
  request->prefix.has_joined = true;
  feed->prefix.joiners.push_back(request);
  SetAwaited(feed);
}

// The nearest of the positions that others wait for; none: 0.
void PrefixSharing::SetAwaited(RequestState* feed) {
  feed->awaited = 0;
  for (const RequestState* joiner : feed->prefix.joiners) {
    const int64_t at = joiner->prefix.join_at;
    if (feed->awaited == 0 || at < feed->awaited) feed->awaited = at;
  }
}

// `common`: where other prompts are known to part from this one. That is where the next one that
// parts will want to start, so it comes before the prompt's own end, and that before the interval.
std::vector<int64_t> PrefixSharing::PlanCheckpoints(int64_t known, int64_t common,
                                                    int64_t end) const {
  const bool parts = common - known >= kLeastGain;
  const bool ends = end - (parts ? common : known) >= kLeastGain;
  std::vector<int64_t> checkpoints;
  if (parts) checkpoints.push_back(common);
  if (ends) checkpoints.push_back(end);
  if (options_.interval > 0) {
    for (int64_t at = (known / options_.interval + 1) * options_.interval; at < end;
         at += options_.interval) {
      const bool apart = at - known >= kLeastGain &&
                         (!parts || std::abs(at - common) >= kLeastGain) &&
                         (!ends || end - at >= kLeastGain);
      if (apart) checkpoints.push_back(at);
    }
  }
  std::sort(checkpoints.begin(), checkpoints.end(), std::greater<>());
  return checkpoints;
}

void PrefixSharing::AddState(RequestState* request, const SharedState& state) {
  PrefixState& prefix = request->prefix;
  if (state != nullptr) {
    options_.cache->Insert(prefix.space, Prefix(*request).first(static_cast<size_t>(request->fed)),
                           state);
  }
  prefix.checkpoints.pop_back();
  SetChunkBoundary(request);
  Release(request, request->fed, state);
  if (prefix.checkpoints.empty()) StopFeeding(request);
  SetAwaited(request);
}

void PrefixSharing::Release(RequestState* feed, int64_t position, const SharedState& state) {
  std::vector<RequestState*>& joiners = feed->prefix.joiners;
  const auto rest = std::stable_partition(
      joiners.begin(), joiners.end(),
      [position](const RequestState* joiner) { return joiner->prefix.join_at <= position; });
  for (auto joiner = joiners.begin(); joiner != rest; ++joiner) {
    (*joiner)->prefix.joined = nullptr;
    if (state != nullptr) {
      (*joiner)->prefix.joined_state = state;
      (*joiner)->prefix.joined_tokens = position;
    }
    released_.push_back(*joiner);
  }
  joiners.erase(joiners.begin(), rest);
}

void PrefixSharing::StartFeeding(RequestState* request) {
  std::unique_ptr<Tree>& tree = feeds_[request->prefix.space];
  if (tree == nullptr) tree = std::make_unique<Tree>();
  tree->Insert(Prefix(*request))->value.requests.push_back(request);
  request->prefix.feeding = true;
}

void PrefixSharing::StopFeeding(RequestState* request) {
  if (!std::exchange(request->prefix.feeding, false)) return;
  for (RequestState* joiner : std::exchange(request->prefix.joiners, {})) {
    joiner->prefix.joined = nullptr;
    released_.push_back(joiner);
  }
  const auto found = feeds_.find(request->prefix.space);
  Tree::Node* const node = found->second->Find(Prefix(*request)).node;
  EraseFrom(&node->value.requests, request);
  found->second->Prune(node);
  if (found->second->empty()) feeds_.erase(found);
}

void PrefixSharing::Leave(RequestState* request) {
  StopFeeding(request);
  SetAwaited(request);
  if (RequestState* const feed = std::exchange(request->prefix.joined, nullptr); feed != nullptr) {
    EraseFrom(&feed->prefix.joiners, request);
    SetAwaited(feed);
  } else if (request->held) {
    EraseFrom(&released_, request);
  }
}

std::vector<RequestState*> PrefixSharing::TakeReleased() { return std::exchange(released_, {}); }

}  // namespace mmfree
