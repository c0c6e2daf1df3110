// The policy under seeded random load on a virtual clock, with what it promises checked at every
// step.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "server/scheduler/policy.h"
#include "server/scheduler/prompt_size.h"

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
  int held_slot = -1;                  // the slot it was given, to see that it keeps it
  int64_t waited_since = 0;            // step
  const Request* waits_for = nullptr;  // while held
};

class Simulation {
 public:
  Simulation(const SimulationCase& parameters, uint64_t seed)
      : parameters_(parameters),
        policy_(parameters.options,
                [this](SchedulerEntry* entry) { Prepare(static_cast<Request*>(entry)); }),
        random_(seed) {}

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
  int preemptions() const { return preemptions_; }
  int holds() const { return holds_; }

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
      request->priority = static_cast<Priority>(Uniform(0, 2));
      request->caller = std::string(1, static_cast<char>('a' + Uniform(0, 3)));
      request->share = request->caller == "a" ? 3 : 1;
      policy_.Enqueue(request, now_);
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
    std::vector<SchedulerEntry*> paused(policy_.paused().begin(), policy_.paused().end());
    paused.insert(paused.end(), policy_.parked().begin(), policy_.parked().end());
    for (SchedulerEntry* entry : paused) {
      if (Chance(0.2)) policy_.Resume(entry);
    }
  }
  void ResumeAll() {
    while (!policy_.paused().empty()) policy_.Resume(policy_.paused()[0]);
    while (!policy_.parked().empty()) policy_.Resume(policy_.parked()[0]);
  }

  // Some wait for another's prompt, as those do that begin alike.
  void Prepare(Request* request) {
    request->held = false;
    if (!Chance(0.3)) return;
    for (const Request* other : live_) {
      if (other == request || other->phase != Phase::kPrefill || other->held ||
          other->rank < request->rank) {
        continue;
      }
      request->held = true;
      request->waits_for = other;
      ++holds_;
      return;
    }
  }

  void Unhold() {
    for (Request* request : live_) {
      if (!request->held || request->phase != Phase::kPrefill) continue;
      if (request->waits_for->phase == Phase::kPrefill && !Chance(0.1)) continue;
      request->fed = Uniform(0, request->prompt_tokens - 1);
      policy_.Unhold(request);
    }
  }

  void Step() {
    Unhold();
    Policy::Plan plan;
    const int64_t prompt_budget = Chance(0.5) ? 1 << 20 : Uniform(0, 20);
    policy_.PlanStep(now_, prompt_budget, &plan);
    preemptions_ += static_cast<int>(plan.preempted.size());
    for (const Policy::Preemption& preemption : plan.preempted) {
      // It may have been given another slot in the same step.
      static_cast<Request*>(preemption.entry)->held_slot = preemption.entry->slot;
    }
    Check(plan, prompt_budget);
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

  void Check(const Policy::Plan& plan, int64_t prompt_budget) {
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
      if (request->phase == Phase::kWaiting || request->phase == Phase::kPreempted ||
          request->phase == Phase::kParked) {
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

    // Within a caller, class and size, first come, first served, but for those whose age counted.
    for (const SchedulerEntry* admitted : plan.admitted) {
      for (const Request* request : live_) {
        if (request->phase != Phase::kWaiting || request->caller != admitted->caller) continue;
        ASSERT_FALSE(request->priority == admitted->priority && request->id < admitted->id &&
                     SizeOf(*request) == SizeOf(*admitted));
      }
    }
    // Who is preempted gives way to a higher class, or to a shorter prompt than what is left of its
    // own, unless its reader lags.
    for (const Policy::Preemption& preemption : plan.preempted) {
      if (preemption.entry->phase == Phase::kParked) continue;
      bool for_higher = false;
      for (const SchedulerEntry* entry : Given(plan)) {
        for_higher |= entry->rank > preemption.entry->priority;
        for_higher |= entry->priority == preemption.entry->priority &&
                      SizeOf(*entry) < SizeOf(*preemption.entry);
      }
      ASSERT_TRUE(for_higher);
    }
    ASSERT_LE(plan.preempted.size(), static_cast<size_t>(Policy::kMaxPreemptionsPerStep));
    ASSERT_LE(tokens - plan.decode_rows, std::max<int64_t>(prompt_budget, 1));

    // No decoding row is left out, and a prompt advances whenever there is one.
    bool prefilling = false;
    bool prompt_advances = false;
    for (const Request* request : live_) {
      const auto row = in_step.find(request);
      if (request->phase == Phase::kDecode) {
        ASSERT_TRUE(row != in_step.end()) << "decoding request " << request->id << " left out";
        ASSERT_EQ(row->second, 1);
      } else if (request->phase == Phase::kPaused || request->phase == Phase::kParked) {
        ASSERT_TRUE(row == in_step.end());
      } else if (request->held) {
        ASSERT_TRUE(row == in_step.end());
        ASSERT_FALSE(plan.rows.empty()) << "request " << request->id << " waits for nothing";
      } else if (request->phase == Phase::kPrefill) {
        prefilling = true;
        if (row == in_step.end()) continue;
        prompt_advances = true;
        ASSERT_LE(row->second, options.prefill_chunk);
        ASSERT_LE(row->second, request->prompt_tokens - request->fed);
      }
    }
    // Rows that come back may use up what was left.
    if (plan.resumed.empty()) {
      ASSERT_EQ(prompt_advances, prefilling);
    }

    // Work conserving: budget is left only when nothing could have used it.
    if (tokens < options.step_token_budget && prompt_budget > options.step_token_budget) {
      ASSERT_TRUE(policy_.waiting() == 0 || running == static_cast<size_t>(policy_.capacity()));
      for (const Request* request : live_) {
        if (request->phase != Phase::kPrefill || request->held) continue;
        ASSERT_EQ(in_step[request],
                  std::min<int64_t>(options.prefill_chunk, request->prompt_tokens - request->fed));
      }
    }
  }

  int SizeOf(const SchedulerEntry& entry) const {
    return PromptSize(entry.prompt_tokens - entry.fed, parameters_.options.prefill_chunk);
  }

  static std::vector<const SchedulerEntry*> Given(const Policy::Plan& plan) {
    std::vector<const SchedulerEntry*> given(plan.admitted.begin(), plan.admitted.end());
    given.insert(given.end(), plan.resumed.begin(), plan.resumed.end());
    return given;
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
  int preemptions_ = 0;
  int holds_ = 0;
};

TEST(PolicySimulationTest, KeepsItsPromisesUnderRandomLoad) {
  const std::vector<SimulationCase> cases = {
      {{.num_slots = 8, .max_batch = 0, .prefill_chunk = 16, .step_token_budget = 32}, 0.3, 80, 40},
      {{.num_slots = 24, .max_batch = 0, .prefill_chunk = 64, .step_token_budget = 96}, 2, 300, 50},
      {{.num_slots = 16, .max_batch = 5, .prefill_chunk = 3, .step_token_budget = 7}, 0.2, 20, 20},
      {{.num_slots = 16, .max_batch = 8, .prefill_chunk = 8, .step_token_budget = 16}, 1, 20, 9},
      {{.num_slots = 4, .max_batch = 0, .prefill_chunk = 1, .step_token_budget = 1}, 0.3, 5, 5},
      {{.num_slots = 1, .max_batch = 1, .prefill_chunk = 256, .step_token_budget = 1024},
       0.3,
       50,
       9},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    int finished = 0, cancelled = 0, expired = 0, pauses = 0, preemptions = 0, holds = 0;
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      SCOPED_TRACE(::testing::Message() << "case " << i << ", seed " << seed);
      Simulation simulation(cases[i], seed);
      simulation.Run(1500);
      ASSERT_FALSE(HasFailure());
      finished += simulation.finished();
      cancelled += simulation.cancelled();
      expired += simulation.expired();
      pauses += simulation.pauses();
      preemptions += simulation.preemptions();
      holds += simulation.holds();
    }
    // The load must have reached every kind of end for the checks to mean something.
    EXPECT_GT(finished, 100) << "case " << i;
    EXPECT_GT(cancelled, 20) << "case " << i;
    EXPECT_GT(expired, 10) << "case " << i;
    EXPECT_GT(pauses, 5) << "case " << i;
    EXPECT_GT(preemptions, 5) << "case " << i;
    // A lone slot leaves nobody to wait for.
    EXPECT_EQ(holds > 20, Policy::Capacity(cases[i].options) > 1) << "case " << i;
  }
}

// Callers that always have requests waiting, each in one class and with a share of its own.
struct Caller {
  std::string name;
  int32_t share;
  Priority priority;
  int64_t max_prompt;
  int64_t max_new;
};

// Runs `steps` steps with `backlog` requests of each caller in line. Returns the tokens of each
// caller in each step.
std::map<std::string, std::vector<int64_t>> Saturate(const Policy::Options& options,
                                                     const std::vector<Caller>& callers, int steps,
                                                     uint64_t seed, int64_t* longest_wait) {
  std::mt19937_64 random(seed);
  const auto uniform = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  Policy policy(options);
  Policy::Plan plan;
  std::map<uint64_t, std::unique_ptr<Request>> requests;
  std::map<std::string, int> in_line;
  std::map<std::string, std::vector<int64_t>> tokens;
  uint64_t next_id = 1;
  absl::Time now = absl::FromUnixSeconds(0);
  *longest_wait = 0;
  for (int step = 0; step < steps; ++step) {
    now += absl::Milliseconds(1);
    for (const Caller& caller : callers) {
      for (; in_line[caller.name] < 8; ++in_line[caller.name]) {
        auto request = std::make_unique<Request>();
        request->id = next_id++;
        request->caller = caller.name;
        request->share = caller.share;
        request->priority = caller.priority;
        request->prompt_tokens = uniform(1, caller.max_prompt);
        request->max_new = uniform(1, caller.max_new);
        request->waited_since = step;
        policy.Enqueue(request.get(), now);
        requests.emplace(request->id, std::move(request));
      }
      tokens[caller.name].push_back(0);
    }
    policy.PlanStep(now, 1 << 20, &plan);
    for (SchedulerEntry* entry : plan.admitted) {
      --in_line[entry->caller];
      *longest_wait = std::max(*longest_wait, step - static_cast<Request*>(entry)->waited_since);
    }
    policy.CompleteStep(plan);
    for (const Policy::Row& row : plan.rows) {
      Request* const request = static_cast<Request*>(row.entry);
      tokens[request->caller].back() += row.tokens;
      if (request->fed < request->prompt_tokens) continue;
      if (++request->emitted < request->max_new) continue;
      policy.Remove(request);
      requests.erase(request->id);
    }
  }
  while (!requests.empty()) {
    policy.Remove(requests.begin()->second.get());
    requests.erase(requests.begin());
  }
  EXPECT_TRUE(policy.empty());
  return tokens;
}

TEST(PolicySimulationTest, CallersGetTheirSharesOverAnyThousandSteps) {
  struct Case {
    Policy::Options options;
    std::vector<Caller> callers;
  };
  const Case cases[] = {
      // Many short requests against few long ones, long prompts against long outputs, and a share
      // of two. Slots are scarce.
      {{.num_slots = 24, .prefill_chunk = 32, .step_token_budget = 64},
       {{"short", 1, Priority::kNormal, 8, 8},
        {"prompts", 1, Priority::kNormal, 150, 4},
        {"outputs", 1, Priority::kNormal, 8, 60},
        {"double", 2, Priority::kNormal, 30, 30}}},
      // Slots enough; prompts of a chunk against prompts of hundreds compete for tokens.
      {{.num_slots = 256, .max_batch = 48, .prefill_chunk = 32, .step_token_budget = 64},
       {{"short", 1, Priority::kNormal, 32, 1},
        {"long", 1, Priority::kNormal, 8000, 1},
        {"longer", 1, Priority::kNormal, 16000, 1},
        {"double", 2, Priority::kNormal, 300, 3}}}};
  for (const auto& [options, callers] : cases) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      int64_t longest_wait = 0;
      auto tokens = Saturate(options, callers, 6000, seed, &longest_wait);
      constexpr int kWindow = 1000;
      // From the first step that finds every caller with rows.
      for (int begin = 200; begin + kWindow <= 6000; begin += 50) {
        int64_t all = 0;
        std::map<std::string, int64_t> in_window;
        for (const Caller& caller : callers) {
          const std::vector<int64_t>& steps = tokens[caller.name];
          in_window[caller.name] =
              std::accumulate(steps.begin() + begin, steps.begin() + begin + kWindow, int64_t{0});
          all += in_window[caller.name];
        }
        for (const Caller& caller : callers) {
          const double due = static_cast<double>(all) * caller.share / 5;
          EXPECT_NEAR(static_cast<double>(in_window[caller.name]) / due, 1, 0.05)
              << caller.name << " from step " << begin << ", seed " << seed;
        }
      }
    }
  }
}

TEST(PolicySimulationTest, NobodyStarvesBehindAFloodOfTheHighestClass) {
  const std::vector<Caller> callers = {
      {"flood", 1, Priority::kHigh, 100, 20},
      {"low", 1, Priority::kLow, 100, 20},
  };
  const Policy::Options options = {
      .num_slots = 8, .prefill_chunk = 32, .step_token_budget = 64, .age = absl::Milliseconds(100)};
  int64_t longest_wait = 0;
  auto tokens = Saturate(options, callers, 20000, 1, &longest_wait);
  const auto sum = [](const std::vector<int64_t>& steps) {
    return std::accumulate(steps.begin(), steps.end(), int64_t{0});
  };
  // One admission in aged_turn, whatever the flood: eight in line wait for eight turns.
  EXPECT_LT(longest_wait, 1500);
  EXPECT_GT(sum(tokens["low"]), sum(tokens["flood"]) / 40);
  EXPECT_LT(sum(tokens["low"]), sum(tokens["flood"]) / 8);
}

}  // namespace
}  // namespace mmfree
