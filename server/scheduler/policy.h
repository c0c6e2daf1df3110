// What runs in the next step: the scheduler's decisions without threads, locks, clocks or a device,
// so that they are tested and simulated as plain code. step_loop.h carries them out.
#ifndef MMFREE_SERVER_SCHEDULER_POLICY_H_
#define MMFREE_SERVER_SCHEDULER_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/scheduler/entry_list.h"
#include "server/scheduler/priority.h"

namespace mmfree {

enum class Phase : uint8_t {
  kNone,     // the policy does not hold it
  kWaiting,  // for a slot
  kPrefill,  // holds a slot; part of its prompt is still to be fed
  kDecode,   // holds a slot; one token a step
  kPaused,   // holds a slot; skips steps because its reader lags
};

// One request as the policy sees it. The caller owns it and keeps it at one address from Enqueue to
// Remove; the first fields are the owner's and constant in between, the last the policy's.
struct SchedulerEntry : EntryListNode {
  uint64_t id = 0;            // distinct; breaks ties of the deadline
  int64_t prompt_tokens = 0;  // to be fed before the first token is sampled; at least one
  absl::Time deadline = absl::InfiniteFuture();
  Priority priority = Priority::kNormal;
  std::string caller;  // whose share of the service it counts against

  // Set by the owner until the entry's first step is planned (Policy::Prepare is the last chance),
  // advanced by the policy: tokens of the prompt that are in the state. Less than prompt_tokens.
  int64_t fed = 0;
  // The owner's to set at any time between steps: while it is above `fed`, a chunk does not go
  // beyond it, so that the state after exactly this many tokens of the prompt can be read.
  int64_t chunk_boundary = 0;

  Phase phase = Phase::kNone;
  int32_t slot = -1;  // while it holds one
  size_t index = 0;   // in the policy's list of decoding or paused entries
};

// Chooses the rows of each step. Order of service is first come, first served:
//   1. every decoding entry has one token in every step, so a flood of prompts never stalls a
//      stream that has begun;
//   2. what is left of the token budget goes to prompts in chunks, oldest admission first;
//   3. waiting entries are admitted, oldest first, while a slot and budget are left.
// The entries that hold slots are at most capacity(), which the budget covers: each step finishes
// some prompt tokens whenever a prompt is being fed. Not thread-safe.
class Policy {
 public:
  struct Options {
    int32_t num_slots = 0;             // of the backend
    int32_t max_batch = 0;             // rows of one step at most; 0: as many as there are slots
    int32_t prefill_chunk = 256;       // tokens of one prompt in one step at most
    int32_t step_token_budget = 1024;  // tokens of one step at most
  };

  // `tokens` tokens of `entry`: prompt tokens [fed, fed + tokens) in kPrefill, one sampled token in
  // kDecode.
  struct Row {
    SchedulerEntry* entry = nullptr;
    int32_t tokens = 0;
  };

  // Reused between steps, so that planning allocates nothing in the long run.
  struct Plan {
    std::vector<Row> rows;                  // decoding rows first
    std::vector<SchedulerEntry*> admitted;  // given a slot in this step
    int64_t tokens = 0;                     // over all rows
    int32_t decode_rows = 0;
  };

  // Entries that can hold a slot at once: no more than slots, max_batch and the budget allow. When
  // max_batch is 0, part of the budget (a chunk, a quarter at most) is kept for prompts.
  static int32_t Capacity(const Options& options);

  // Called once for an entry, in PlanStep when it has been given its slot and before its first
  // chunk is chosen: may set `fed` and `chunk_boundary`. Must not call the policy.
  using Prepare = std::function<void(SchedulerEntry*)>;

  // Every option at least 1 (max_batch: 0). CHECK-fails otherwise.
  explicit Policy(const Options& options, Prepare prepare = nullptr);
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // Puts an entry at the end of the waiting line.
  void Enqueue(SchedulerEntry* entry);

  // Forgets an entry in whatever phase it is and frees its slot.
  void Remove(SchedulerEntry* entry);

  // Appends the entries whose deadline is at or before `now`; they stay until removed.
  void CollectExpired(absl::Time now, std::vector<SchedulerEntry*>* expired) const;

  // Decides the next step. Admitted entries have their slot (its state is the caller's to reset)
  // when this returns; rows is empty when nothing can run.
  void PlanStep(Plan* plan);

  // The step has been done: prompts advance, and those fed to the end go on to decode. The entries
  // of the plan must still be held; remove those that have ended afterwards.
  void CompleteStep(const Plan& plan);

  // A decoding entry skips steps, keeping its slot, until Resume.
  void Pause(SchedulerEntry* entry);
  void Resume(SchedulerEntry* entry);

  size_t waiting() const { return waiting_.size(); }
  // Entries that hold a slot.
  size_t running() const { return prefilling_.size() + decoding_.size() + paused_.size(); }
  absl::Span<SchedulerEntry* const> paused() const { return paused_; }
  bool empty() const { return waiting() + running() == 0; }

  int32_t capacity() const { return capacity_; }

 private:
  void AddPrefillRow(SchedulerEntry* entry, Plan* plan) const;
  static void Append(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry);
  static void EraseAt(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry);

  const Options options_;
  const int32_t capacity_;
  const Prepare prepare_;

  EntryList<SchedulerEntry> waiting_;     // in order of arrival
  EntryList<SchedulerEntry> prefilling_;  // in order of admission
  std::vector<SchedulerEntry*> decoding_;
  std::vector<SchedulerEntry*> paused_;
  std::vector<int32_t> free_slots_;  // the last one is given out next

  struct EarlierDeadline {
    bool operator()(const SchedulerEntry* a, const SchedulerEntry* b) const {
      return std::pair(a->deadline, a->id) < std::pair(b->deadline, b->id);
    }
  };
  // Every held entry with a finite deadline.
  absl::btree_set<SchedulerEntry*, EarlierDeadline> deadlines_;
};

// Bounds what may be in the system. Every request that was admitted is counted until it ends, so
// the queue bound is exact: with a free slot a request is never refused because others are about to
// take theirs. Not thread-safe.
class AdmissionControl {
 public:
  struct Options {
    int32_t capacity = 0;          // requests that can run at once
    int32_t max_queue = 0;         // requests beyond those
    int64_t max_queue_tokens = 0;  // prompt tokens of requests that wait
  };

  explicit AdmissionControl(const Options& options) : options_(options) {}

  // Counts a request as waiting, or RESOURCE_EXHAUSTED naming the limit.
  absl::Status Admit(int64_t prompt_tokens);
  // Waiting requests got their slots.
  void Started(int64_t requests, int64_t prompt_tokens);
  // Requests ended while waiting, or running.
  void EndedWaiting(int64_t requests, int64_t prompt_tokens);
  void EndedRunning(int64_t requests);

  int64_t waiting() const { return waiting_; }
  int64_t waiting_tokens() const { return waiting_tokens_; }
  int64_t running() const { return running_; }
  bool empty() const { return waiting_ + running_ == 0; }
  // Requests that have to end before one that is admitted now gets a slot.
  int64_t departures_before_next() const;

 private:
  const Options options_;
  int64_t waiting_ = 0;
  int64_t waiting_tokens_ = 0;
  int64_t running_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_POLICY_H_
