#include "server/engine/engine_group.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/scheduler/retry_after.h"

namespace mmfree {
namespace {

// Share of a member's slots that its requests want; above 1 some wait.
double Demand(const Engine::Load& load) {
  return static_cast<double>(load.running + load.queued) / load.slots_total;
}

bool Has(const Engine& engine, const DevicePool* wanted) {
  const std::vector<std::shared_ptr<DevicePool>> pools = engine.device_pools();
  return std::any_of(pools.begin(), pools.end(),
                     [wanted](const auto& pool) { return pool.get() == wanted; });
}

BackendInfo Combined(const std::vector<std::unique_ptr<Engine>>& members) {
  BackendInfo info = members.front()->backend_info();
  info.description = absl::StrCat(members.size(), " x ", info.description);
  for (size_t i = 1; i < members.size(); ++i) {
    const BackendInfo& member = members[i]->backend_info();
    info.num_slots += member.num_slots;
    info.resident_slots += member.resident_slots;
    info.weight_bytes += member.weight_bytes;
    info.state_bytes += member.state_bytes;
    info.max_step_tokens = std::min(info.max_step_tokens, member.max_step_tokens);
  }
  return info;
}

// Where the state is that a request goes on from, when that is a device.
const DevicePool* HomeOf(const GenerationRequest& request) {
  return request.device_state == nullptr ? nullptr : request.device_state->pool();
}
const DevicePool* HomeOf(const ScoreRequest& /*request*/) { return nullptr; }

class EngineGroup final : public Engine {
 public:
  explicit EngineGroup(std::vector<std::unique_ptr<Engine>> members)
      : members_(std::move(members)), info_(Combined(members_)) {}

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override {
    return Dispatch(std::move(request), std::move(sink), &Engine::Submit);
  }
  absl::StatusOr<RequestHandle> Score(ScoreRequest request,
                                      std::shared_ptr<ScoreSink> sink) override {
    return Dispatch(std::move(request), std::move(sink), &Engine::Score);
  }

  // The members share one cache, if any.
  int64_t CachedTokens(const GenerationRequest& request) const override {
    return members_.front()->CachedTokens(request);
  }

  void Cancel(RequestHandle handle) override {
    members_[handle % members_.size()]->Cancel(handle / members_.size());
  }

  void Drain(absl::Time deadline) override {
    std::vector<std::thread> drains;
    for (const std::unique_ptr<Engine>& member : members_) {
      drains.emplace_back([&member, deadline] { member->Drain(deadline); });
    }
    for (std::thread& drain : drains) drain.join();
  }

  bool healthy() const override {
    return std::any_of(members_.begin(), members_.end(),
                       [](const auto& member) { return member->healthy(); });
  }

  Limits limits() const override {
    Limits sum;
    for (const std::unique_ptr<Engine>& member : members_) {
      const Limits limits = member->limits();
      sum.requests += limits.requests;
      sum.queue_tokens += limits.queue_tokens;
      sum.prompt_tokens = std::max(sum.prompt_tokens, limits.prompt_tokens);
    }
    return sum;
  }

  Load load() const override {
    Load sum;
    sum.estimated_wait = absl::InfiniteDuration();
    for (const std::unique_ptr<Engine>& member : members_) {
      const Load load = member->load();
      sum.queued += load.queued;
      sum.running += load.running;
      sum.paused += load.paused;
      sum.preempted += load.preempted;
      sum.queued_tokens += load.queued_tokens;
      sum.tokens_in_flight += load.tokens_in_flight;
      sum.step_time = std::max(sum.step_time, load.step_time);
      sum.slots_used += load.slots_used;
      sum.slots_total += load.slots_total;
      if (member->healthy()) sum.estimated_wait = std::min(sum.estimated_wait, load.estimated_wait);
    }
    if (sum.estimated_wait == absl::InfiniteDuration()) sum.estimated_wait = absl::ZeroDuration();
    return sum;
  }

  std::vector<std::shared_ptr<DevicePool>> device_pools() const override {
    std::vector<std::shared_ptr<DevicePool>> pools;
    for (const std::unique_ptr<Engine>& member : members_) {
      for (std::shared_ptr<DevicePool>& pool : member->device_pools()) {
        pools.push_back(std::move(pool));
      }
    }
    return pools;
  }

  const std::string& model_name() const override { return members_.front()->model_name(); }
  const Model& model() const override { return members_.front()->model(); }
  const Tokenizer& tokenizer() const override { return members_.front()->tokenizer(); }
  const BackendInfo& backend_info() const override { return info_; }
  ConstraintCache* constraints() const override { return members_.front()->constraints(); }

 private:
  // Members in the order in which a request asks them: healthy ones first, then the one that has
  // its state and a free slot, then by demand.
  std::vector<size_t> Order(const DevicePool* home) const {
    std::vector<std::tuple<bool, bool, double>> keys;
    for (const std::unique_ptr<Engine>& member : members_) {
      const double demand = Demand(member->load());
      const bool at_home = home != nullptr && demand < 1 && Has(*member, home);
      keys.emplace_back(!member->healthy(), !at_home, demand);
    }
    std::vector<size_t> order(members_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&keys](size_t a, size_t b) { return keys[a] < keys[b]; });
    return order;
  }

  template <typename Request, typename Sink>
  absl::StatusOr<RequestHandle> Dispatch(
      Request request, std::shared_ptr<Sink> sink,
      absl::StatusOr<RequestHandle> (Engine::*submit)(Request, std::shared_ptr<Sink>)) {
    absl::Status refusal;
    absl::Duration retry_after = absl::InfiniteDuration();
    for (const size_t index : Order(HomeOf(request))) {
      const absl::StatusOr<RequestHandle> handle = (members_[index].get()->*submit)(request, sink);
      if (handle.ok()) return *handle * members_.size() + index;
      absl::Status status = handle.status();
      const std::optional<absl::Duration> delay = TakeRetryAfter(&status);
      if (delay.has_value()) retry_after = std::min(retry_after, *delay);
      refusal.Update(status);
      // Another member would say the same.
      if (!absl::IsResourceExhausted(status) && !absl::IsUnavailable(status)) break;
    }
    if (retry_after != absl::InfiniteDuration()) SetRetryAfter(retry_after, &refusal);
    return refusal;
  }

  const std::vector<std::unique_ptr<Engine>> members_;
  const BackendInfo info_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> GroupEngines(std::vector<std::unique_ptr<Engine>> members) {
  if (members.empty()) return absl::InvalidArgumentError("an engine group needs a member");
  for (const std::unique_ptr<Engine>& member : members) {
    if (member->model_name() == members.front()->model_name() &&
        member->model().digest() == members.front()->model().digest()) {
      continue;
    }
    return absl::InvalidArgumentError("the members of an engine group must serve one model");
  }
  if (members.size() == 1) return std::move(members.front());
  return std::make_unique<EngineGroup>(std::move(members));
}

}  // namespace mmfree
