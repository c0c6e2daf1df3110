// The policy under seeded random load on a virtual clock, with what it promises checked at every
// step.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "server/scheduler/policy.h"

namespace mmfree {
namespace {

struct SimulationCase {
  Policy::Options options;
  double arrivals_per_step;
  int max_prompt;
  int max_new;
};

// A request as its client and the step loop see it.
struct Request : SchedulerEntry {
  int64_t emitted = 0;
  int64_t max_new = 0;
  int ends = 0;
  int held_slot = -1;  // the slot it was given, to see that it keeps it
};

class Simulation {
 public:
  Simulation(const SimulationCase& parameters, uint64_t seed)
      : parameters_(parameters), policy_(parameters.options), random_(seed) {}

  void Run(int steps) {
    for (int step = 0; step < steps; ++step) {
      now_ += absl::Milliseconds(1);
      if (step < steps / 2) Arrive();
      CancelSome();
      Expire();
      ResumeSome();
      Step();
      if (::testing::Test::HasFailure()) return;
    }
    // Arrivals stop half way; everything must have left long before the end.
    ResumeAll();
    for (int step = 0; step < 100000 && !policy_.empty(); ++step) {
      Step();
      ResumeAll();
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_TRUE(policy_.empty());
    for (const auto& request : requests_) {
      ASSERT_EQ(request->ends, 1) << "request " << request->id;
    }
    EXPECT_GT(finished_, 0);
  }

  int finished() const { return finished_; }
  int cancelled() const { return cancelled_; }
  int expired() const { return expired_; }
  int pauses() const { return pauses_; }

 private:
  bool Chance(double probability) { return std::bernoulli_distribution(probability)(random_); }
  int64_t Uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  void Arrive() {
    const int count = std::poisson_distribution<int>(parameters_.arrivals_per_step)(random_);
    for (int i = 0; i < count; ++i) {
      requests_.push_back(std::make_unique<Request>());
      Request* const request = requests_.back().get();
      request->id = requests_.size();
      request->prompt_tokens = Uniform(1, parameters_.max_prompt);
      request->max_new = Uniform(0, parameters_.max_new);
      if (Chance(0.3)) request->deadline = now_ + absl::Milliseconds(Uniform(1, 150));
      live_.insert(request);
      policy_.Enqueue(request);
    }
  }

  void End(Request* request) {
    ++request->ends;
    live_.erase(request);
    policy_.Remove(request);
  }

  void CancelSome() {
    if (live_.empty() || !Chance(0.1)) return;
    auto victim = live_.begin();
    std::advance(victim, Uniform(0, static_cast<int64_t>(live_.size()) - 1));
    End(*victim);
    ++cancelled_;
  }

  void Expire() {
    std::vector<SchedulerEntry*> expired;
    policy_.CollectExpired(now_, &expired);
    for (SchedulerEntry* entry : expired) {
      ASSERT_LE(entry->deadline, now_);
      End(static_cast<Request*>(entry));
      ++expired_;
    }
    for (const Request* request : live_) {
      ASSERT_GT(request->deadline, now_) << "request " << request->id << " outlived its deadline";
    }
  }

  void ResumeSome() {
    const std::vector<SchedulerEntry*> paused(policy_.paused().begin(), policy_.paused().end());
    for (SchedulerEntry* entry : paused) {
      if (Chance(0.2)) policy_.Resume(entry);
    }
  }
  void ResumeAll() {
    while (!policy_.paused().empty()) policy_.Resume(policy_.paused()[0]);
  }

  void Step() {
    Policy::Plan plan;
    std::vector<const Request*> waiting;  // oldest first, ids are in order of arrival
    for (const Request* request : live_) {
      if (request->phase == Phase::kWaiting) waiting.push_back(request);
    }
    std::sort(waiting.begin(), waiting.end(),
              [](const Request* a, const Request* b) { return a->id < b->id; });
    policy_.PlanStep(&plan);
    Check(plan, waiting);
    if (::testing::Test::HasFailure()) return;

    policy_.CompleteStep(plan);
    for (const Policy::Row& row : plan.rows) {
      Request* const request = static_cast<Request*>(row.entry);
      if (request->fed < request->prompt_tokens) continue;
      ASSERT_EQ(request->phase, Phase::kDecode);
      if (request->max_new > 0) ++request->emitted;
      if (request->emitted == request->max_new) {
        End(request);
        ++finished_;
      } else if (Chance(0.02)) {
        policy_.Pause(request);
        ++pauses_;
      }
    }
  }

  void Check(const Policy::Plan& plan, const std::vector<const Request*>& waiting_before) {
    const Policy::Options& options = parameters_.options;
    // Budgets.
    int64_t tokens = 0;
    std::map<const SchedulerEntry*, int32_t> in_step;
    for (const Policy::Row& row : plan.rows) {
      ASSERT_GE(row.tokens, 1);
      ASSERT_TRUE(in_step.emplace(row.entry, row.tokens).second) << "an entry in two rows";
      tokens += row.tokens;
    }
    ASSERT_EQ(tokens, plan.tokens);
    ASSERT_LE(tokens, options.step_token_budget);
    ASSERT_LE(plan.rows.size(), static_cast<size_t>(policy_.capacity()));
    if (options.max_batch > 0) {
      ASSERT_LE(plan.rows.size(), static_cast<size_t>(options.max_batch));
    }

    // Slots: each held by one, kept from admission to end.
    std::set<int32_t> slots;
    size_t running = 0;
    for (Request* request : live_) {
      if (request->phase == Phase::kWaiting) {
        ASSERT_EQ(request->slot, -1);
        ASSERT_FALSE(in_step.count(request));
        continue;
      }
      ++running;
      ASSERT_GE(request->slot, 0);
      ASSERT_LT(request->slot, options.num_slots);
      ASSERT_TRUE(slots.insert(request->slot).second) << "slot " << request->slot << " held twice";
      if (request->held_slot < 0) request->held_slot = request->slot;
      ASSERT_EQ(request->held_slot, request->slot);
    }
    ASSERT_EQ(running, policy_.running());
    ASSERT_LE(running, static_cast<size_t>(policy_.capacity()));

    // First come, first served.
    for (size_t i = 0; i < plan.admitted.size(); ++i) {
      ASSERT_EQ(plan.admitted[i], waiting_before[i]);
    }

    // No decoding row is left out, and a prompt advances whenever there is one.
    bool prefilling = false;
    bool prompt_advances = false;
    for (const Request* request : live_) {
      const auto row = in_step.find(request);
      if (request->phase == Phase::kDecode) {
        ASSERT_TRUE(row != in_step.end()) << "decoding request " << request->id << " left out";
        ASSERT_EQ(row->second, 1);
      } else if (request->phase == Phase::kPaused) {
        ASSERT_TRUE(row == in_step.end());
      } else if (request->phase == Phase::kPrefill) {
        prefilling = true;
        if (row == in_step.end()) continue;
        prompt_advances = true;
        ASSERT_LE(row->second, options.prefill_chunk);
        ASSERT_LE(row->second, request->prompt_tokens - request->fed);
      }
    }
    ASSERT_EQ(prompt_advances, prefilling);

    // Work conserving: budget is left only when nothing could have used it.
    if (tokens < options.step_token_budget) {
      ASSERT_TRUE(policy_.waiting() == 0 || running == static_cast<size_t>(policy_.capacity()));
      for (const Request* request : live_) {
        if (request->phase != Phase::kPrefill) continue;
        ASSERT_EQ(in_step[request],
                  std::min<int64_t>(options.prefill_chunk, request->prompt_tokens - request->fed));
      }
    }
  }

  const SimulationCase parameters_;
  Policy policy_;
  std::mt19937_64 random_;
  absl::Time now_ = absl::FromUnixSeconds(0);
  std::vector<std::unique_ptr<Request>> requests_;
  struct ById {
    bool operator()(const Request* a, const Request* b) const { return a->id < b->id; }
  };
  std::set<Request*, ById> live_;
  int finished_ = 0;
  int cancelled_ = 0;
  int expired_ = 0;
  int pauses_ = 0;
};

TEST(PolicySimulationTest, KeepsItsPromisesUnderRandomLoad) {
  const std::vector<SimulationCase> cases = {
      {{.num_slots = 8, .max_batch = 0, .prefill_chunk = 16, .step_token_budget = 32}, 0.3, 80, 40},
      {{.num_slots = 64, .max_batch = 0, .prefill_chunk = 64, .step_token_budget = 96}, 2, 300, 50},
      {{.num_slots = 16, .max_batch = 5, .prefill_chunk = 3, .step_token_budget = 7}, 0.2, 20, 20},
      {{.num_slots = 16, .max_batch = 16, .prefill_chunk = 8, .step_token_budget = 16}, 1, 20, 9},
      {{.num_slots = 4, .max_batch = 0, .prefill_chunk = 1, .step_token_budget = 1}, 0.3, 5, 5},
      {{.num_slots = 1, .max_batch = 1, .prefill_chunk = 256, .step_token_budget = 1024},
       0.3,
       50,
       9},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    int finished = 0, cancelled = 0, expired = 0, pauses = 0;
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      SCOPED_TRACE(::testing::Message() << "case " << i << ", seed " << seed);
      Simulation simulation(cases[i], seed);
      simulation.Run(1500);
      ASSERT_FALSE(HasFailure());
      finished += simulation.finished();
      cancelled += simulation.cancelled();
      expired += simulation.expired();
      pauses += simulation.pauses();
    }
    // The load must have reached every kind of end for the checks to mean something.
    EXPECT_GT(finished, 100) << "case " << i;
    EXPECT_GT(cancelled, 20) << "case " << i;
    EXPECT_GT(expired, 10) << "case " << i;
    EXPECT_GT(pauses, 5) << "case " << i;
  }
}

}  // namespace
}  // namespace mmfree
