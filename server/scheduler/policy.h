// What runs in the next step: the scheduler's decisions without threads, locks, clocks or a device,
// so that they are tested and simulated as plain code. step_loop.h carries them out.
#ifndef MMFREE_SERVER_SCHEDULER_POLICY_H_
#define MMFREE_SERVER_SCHEDULER_POLICY_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/scheduler/entry.h"
#include "server/scheduler/turn_order.h"

namespace mmfree {

// Chooses the rows of each step:
//   1. every decoding entry has one token in every step, so a flood of prompts never stalls a
//      stream that has begun;
//   2. what is left of the token budget goes to prompts in chunks, class by class from the highest,
//      in the order of TurnOrder: fair between callers, and of a caller's prompts the one first
//      that has least left. Those that wait for a slot take part while there is one, so a short
//      prompt overtakes long ones, and long ones hold slots only while they are fed;
//   3. when no slot is left, an entry whose turn it is takes that of a paused one, or else of one
//      of a lower class, or of its own one that has a longer prompt left to feed; it gets its state
//      back later (preemption).
// Against starvation, in each kAgedStep-th step the prompt comes first that has been in the system
// for longest of those being fed; and each aged_turn-th admission goes to whoever has waited
// longest, if longer than `age`, and the one before has been fed. That entry is not preempted.
//
// The entries that hold slots are at most capacity(), which the budget covers: each step finishes
// some prompt tokens whenever a prompt is being fed. Not thread-safe.
class Policy {
 public:
  struct Options {
    int32_t num_slots = 0;             // of the backend
    int32_t max_batch = 0;             // rows of one step at most; 0: as many as there are slots
    int32_t prefill_chunk = 256;       // tokens of one prompt in one step at most
    int32_t step_token_budget = 1024;  // tokens of one step at most
    absl::Duration age = absl::Seconds(5);
    int32_t aged_turn = 16;
  };
  static constexpr int64_t kAgedStep = 8;
  // Slots taken away in one step at most: bounds the time that a step spends on copying states.
  static constexpr int kMaxPreemptionsPerStep = 4;

  // `tokens` tokens of `entry`: prompt tokens [fed, fed + tokens) in kPrefill, one sampled token in
  // kDecode.
  struct Row {
    SchedulerEntry* entry = nullptr;
    int32_t tokens = 0;
  };

  struct Preemption {
    SchedulerEntry* entry = nullptr;
    int32_t slot = -1;  // that it held
  };

  // What to do, in this order: save the states of `preempted`, restore those of `resumed`, make the
  // first states of `admitted`, step `rows`. An entry can be preempted and resumed in one plan.
  // Reused between steps, so that planning allocates nothing in the long run.
  struct Plan {
    std::vector<Preemption> preempted;
    std::vector<SchedulerEntry*> resumed;
    std::vector<SchedulerEntry*> admitted;  // given their first slot
    std::vector<Row> rows;                  // decoding rows first
    int64_t tokens = 0;                     // over all rows
    int32_t decode_rows = 0;
  };

  // Entries that can hold a slot at once: no more than slots, max_batch and the budget allow. When
  // max_batch is 0, part of the budget (a chunk, a quarter at most) is kept for prompts.
  static int32_t Capacity(const Options& options);

  // Called for an entry in PlanStep when it has been given its first slot and before its first
  // chunk is chosen: may set `fed` and `chunk_boundary`, or `held`. One that lost its slot while it
  // was held is prepared again when it gets another. Calls nothing of the policy but Refile.
  using Prepare = std::function<void(SchedulerEntry*)>;

  // Every option at least 1 (max_batch: 0). CHECK-fails otherwise.
  explicit Policy(const Options& options, Prepare prepare = nullptr);
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // Gets in line.
  void Enqueue(SchedulerEntry* entry, absl::Time now);

  // Forgets an entry in whatever phase it is and frees its slot.
  void Remove(SchedulerEntry* entry);

  // Appends the entries whose deadline is at or before `now`; they stay until removed.
  void CollectExpired(absl::Time now, std::vector<SchedulerEntry*>* expired) const;

  // Decides the next step, with at most `prompt_budget` prompt tokens (but always one) beside
  // decoding rows. Slots are given and taken when this returns; rows is empty when nothing can run.
  void PlanStep(absl::Time now, int64_t prompt_budget, Plan* plan);

  // The step has been done: prompts advance, those fed to the end go on to decode, and callers are
  // charged. The entries of the plan must still be held; remove those that have ended afterwards.
  // Instead, those of a step that failed are removed.
  void CompleteStep(const Plan& plan);

  // The last step took `tokens` more of a decoding entry than the plan said.
  void Charge(SchedulerEntry* entry, int64_t tokens) { order_.Charge(entry, tokens); }

  // The owner has changed `awaited`. Also within Prepare.
  void Refile(SchedulerEntry* entry) { order_.Refile(entry); }

  // A decoding entry skips steps until Resume. It keeps its slot, unless another entry needs it.
  void Pause(SchedulerEntry* entry);
  void Resume(SchedulerEntry* entry);

  // An entry that was held takes part in steps from now on, from its `fed` on. Somebody that is not
  // held must be fed a prompt while any entry is.
  void Unhold(SchedulerEntry* entry);

  size_t waiting() const { return order_.size(Line::kWaiting); }
  size_t decoding() const;
  // Entries that hold a slot.
  size_t running() const { return options_.num_slots - free_slots_.size(); }
  absl::Span<SchedulerEntry* const> paused() const { return paused_; }
  absl::Span<SchedulerEntry* const> parked() const { return parked_; }
  bool empty() const { return waiting() + running() + parked_.size() == 0; }

  // Constant, so that any thread may ask.
  int32_t capacity() const { return capacity_; }
  int32_t step_token_budget() const { return options_.step_token_budget; }
  // Accounts of callers, as TurnOrder::accounts.
  size_t accounts() const { return order_.accounts(); }

 private:
  template <typename T>
  using ByRank = std::array<T, kNumPriorities>;

  bool HasFreeSlot() const { return running() < static_cast<size_t>(capacity_); }
  SchedulerEntry* FindVictim(const SchedulerEntry& taker, const Plan& plan) const;
  void Preempt(SchedulerEntry* victim, Plan* plan);
  void AdmitAged(absl::Time now, Plan* plan);
  void Admit(SchedulerEntry* entry, Plan* plan);
  void FeedOldest();
  void TakeTurns(Priority priority, Plan* plan);
  // Prompt tokens that the step being planned has still room for.
  int64_t tokens_left() const { return std::min(prompt_left_, room_left_); }
  static int64_t CutAtBoundary(const SchedulerEntry& entry, int64_t tokens);
  void AddPromptRow(SchedulerEntry* entry);
  void WriteRows(Plan* plan);
  void StartDecoding(SchedulerEntry* entry);
  // Takes an entry that holds a slot, or is parked, off its list.
  void Unlist(SchedulerEntry* entry);

  const Options options_;
  const int32_t capacity_;
  const Prepare prepare_;

  TurnOrder order_;
  ByRank<std::vector<SchedulerEntry*>> prefilling_;
  ByRank<std::vector<SchedulerEntry*>> decoding_;
  std::vector<SchedulerEntry*> paused_;
  std::vector<SchedulerEntry*> parked_;
  std::vector<int32_t> free_slots_;  // the last one is given out next
  int64_t steps_ = 0;
  int32_t turns_ = 0;               // admissions since an aged entry had its turn
  SchedulerEntry* aged_ = nullptr;  // that entry, while it is in kPrefill

  // Of the step being planned.
  std::vector<Row> prompt_rows_;
  int64_t prompt_left_ = 0;  // tokens for prompts
  int64_t room_left_ = 0;    // tokens of all kinds

  struct EarlierDeadline {
    bool operator()(const SchedulerEntry* a, const SchedulerEntry* b) const {
      return std::pair(a->deadline, a->id) < std::pair(b->deadline, b->id);
    }
  };
  // Every held entry with a finite deadline.
  absl::btree_set<SchedulerEntry*, EarlierDeadline> deadlines_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_POLICY_H_
