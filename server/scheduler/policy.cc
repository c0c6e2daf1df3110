#include "server/scheduler/policy.h"

#include <algorithm>
#include <utility>

#include "absl/base/internal/raw_logging.h"

namespace mmfree {
namespace {

size_t Index(Priority priority) { return static_cast<size_t>(priority); }

void Append(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry) {
  entry->index = list->size();
  list->push_back(entry);
}

void EraseAt(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry) {
  SchedulerEntry* const last = list->back();
  (*list)[entry->index] = last;
  last->index = entry->index;
  list->pop_back();
}

}  // namespace

int32_t Policy::Capacity(const Options& options) {
  ABSL_RAW_CHECK(options.num_slots >= 1 && options.max_batch >= 0 && options.prefill_chunk >= 1 &&
                     options.step_token_budget >= 1 && options.aged_turn >= 1,
                 "scheduler options out of range");
  int32_t rows = options.max_batch;
  if (rows == 0) {
    const int32_t for_prompts = std::min(options.prefill_chunk, options.step_token_budget / 4);
    rows = options.step_token_budget - for_prompts;
  }
  return std::min({rows, options.step_token_budget, options.num_slots});
}

Policy::Policy(const Options& options, Prepare prepare)
    : options_(options), capacity_(Capacity(options)), prepare_(std::move(prepare)) {
  free_slots_.reserve(options.num_slots);
  // Low slots first, so that a lightly loaded backend touches little memory.
  for (int32_t slot = options.num_slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

void Policy::Enqueue(SchedulerEntry* entry, absl::Time now) {
  ABSL_RAW_CHECK(
      entry->phase == Phase::kNone && entry->fed >= 0 && entry->fed < entry->prompt_tokens,
      "bad entry");
  entry->phase = Phase::kWaiting;
  entry->rank = entry->priority;
  entry->slot = -1;
  entry->arrival = now;
  line_.Join(entry);
  line_.Append(entry);
  if (entry->deadline != absl::InfiniteFuture()) deadlines_.insert(entry);
}

void Policy::Unlist(SchedulerEntry* entry) {
  switch (entry->phase) {
    case Phase::kPrefill:
      prefilling_[Index(entry->rank)].Erase(entry);
      break;
    case Phase::kDecode:
      EraseAt(&decoding_[Index(entry->rank)], entry);
      break;
    case Phase::kPaused:
      EraseAt(&paused_, entry);
      break;
    case Phase::kParked:
      EraseAt(&parked_, entry);
      break;
    case Phase::kNone:
    case Phase::kWaiting:
    case Phase::kPreempted:
      ABSL_RAW_CHECK(false, "the entry is in no list");
  }
}

void Policy::Remove(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->phase != Phase::kNone, "removed an entry that is not held");
  if (entry->phase == Phase::kWaiting || entry->phase == Phase::kPreempted) {
    line_.Withdraw(entry);
  } else {
    Unlist(entry);
  }
  line_.Leave(entry);
  if (entry->slot >= 0) free_slots_.push_back(entry->slot);
  entry->slot = -1;
  entry->phase = Phase::kNone;
  if (entry->deadline != absl::InfiniteFuture()) deadlines_.erase(entry);
}

void Policy::CollectExpired(absl::Time now, std::vector<SchedulerEntry*>* expired) const {
  for (SchedulerEntry* entry : deadlines_) {
    if (entry->deadline > now) break;
    expired->push_back(entry);
  }
}

size_t Policy::decoding() const {
  size_t rows = 0;
  for (const std::vector<SchedulerEntry*>& list : decoding_) rows += list.size();
  return rows;
}

// The entry to take a slot from for one of class `priority`; null when there is none. A paused one
// makes no use of its slot. Otherwise one of the lowest class, and one that streams before one that
// is still to answer.
SchedulerEntry* Policy::FindVictim(Priority priority) const {
  if (!paused_.empty()) return paused_.back();
  for (size_t rank = 0; rank < Index(priority); ++rank) {
    if (!decoding_[rank].empty()) return decoding_[rank].back();
    if (!prefilling_[rank].empty()) return prefilling_[rank].back();
  }
  return nullptr;
}

void Policy::Preempt(SchedulerEntry* victim, Plan* plan) {
  Unlist(victim);
  plan->preempted.push_back({victim, victim->slot});
  free_slots_.push_back(std::exchange(victim->slot, -1));
  if (victim->phase == Phase::kPaused) {
    victim->phase = Phase::kParked;
    Append(&parked_, victim);
  } else {
    victim->phase = Phase::kPreempted;
    line_.Prepend(victim);
  }
}

// Frees slots for those that wait: as many as they are, a step may take away, and a step of
// `prompt_tokens` has use for (a slot that must wait for tokens is better left where it is).
void Policy::PreemptForWaiting(int64_t prompt_tokens, Plan* plan) {
  // In an aged step the tokens may go to a prompt of a lower class.
  if (line_.empty() || steps_ % kAgedStep == 0) return;
  int64_t free = capacity_ - static_cast<int64_t>(running());
  for (int rank = kNumPriorities - 1; rank >= 0; --rank) {
    const Priority priority = static_cast<Priority>(rank);
    int64_t want = static_cast<int64_t>(line_.size(priority)) - std::max<int64_t>(free, 0);
    free -= static_cast<int64_t>(line_.size(priority));
    const EntryList<SchedulerEntry>& prefilling = prefilling_[rank];
    for (const SchedulerEntry* entry = prefilling.front(); entry != nullptr && prompt_tokens > 0;
         entry = prefilling.After(entry)) {
      if (entry->held) continue;
      prompt_tokens -= std::min<int64_t>(options_.prefill_chunk, entry->prompt_tokens - entry->fed);
    }
    while (want > 0 && prompt_tokens > 0 && plan->preempted.size() < kMaxPreemptionsPerStep) {
      SchedulerEntry* const victim = FindVictim(priority);
      if (victim == nullptr) break;
      Preempt(victim, plan);
      prompt_tokens -= options_.prefill_chunk;
      --want;
    }
  }
}

void Policy::AddPrefillRow(SchedulerEntry* entry, int64_t limit, Plan* plan) const {
  int64_t tokens = std::min<int64_t>(
      {options_.prefill_chunk, entry->prompt_tokens - entry->fed, limit - plan->tokens});
  if (entry->chunk_boundary > entry->fed) {
    tokens = std::min(tokens, entry->chunk_boundary - entry->fed);
  }
  entry->planned_step = steps_;
  plan->rows.push_back({entry, static_cast<int32_t>(tokens)});
  plan->tokens += tokens;
}

void Policy::StartDecoding(SchedulerEntry* entry) {
  entry->phase = Phase::kDecode;
  Append(&decoding_[Index(entry->rank)], entry);
}

// Gives an entry in line a slot and its first row; a slot and budget are left.
void Policy::Admit(SchedulerEntry* entry, bool in_turn, int64_t limit, Plan* plan) {
  ++turns_;
  const bool started = entry->phase == Phase::kPreempted;
  line_.Withdraw(entry);
  entry->slot = free_slots_.back();
  free_slots_.pop_back();
  const bool begins = !started || entry->held;
  if (begins && prepare_ != nullptr) {
    prepare_(entry);
    ABSL_RAW_CHECK(entry->fed < entry->prompt_tokens, "a prompt without a token to feed");
  }
  (started ? plan->resumed : plan->admitted).push_back(entry);
  line_.Admitted(entry, 0, in_turn);
  if (begins) line_.Pledge(entry, entry->prompt_tokens - entry->fed);
  if (entry->fed < entry->prompt_tokens) {
    entry->phase = Phase::kPrefill;
    prefilling_[Index(entry->rank)].PushBack(entry);
    if (!entry->held) AddPrefillRow(entry, limit, plan);
  } else {
    // Its row joins the decoding ones, which come first.
    StartDecoding(entry);
    plan->rows.push_back({entry, 1});
    std::swap(plan->rows[plan->decode_rows], plan->rows.back());
    ++plan->decode_rows;
    ++plan->tokens;
  }
}

void Policy::AdmitAged(absl::Time now, int64_t limit, Plan* plan) {
  SchedulerEntry* const oldest = line_.Oldest();
  if (oldest == nullptr || turns_ + 1 < options_.aged_turn ||
      now - oldest->arrival < options_.age || !HasFreeSlot() || plan->tokens >= limit) {
    return;
  }
  oldest->rank = Priority::kHigh;
  Admit(oldest, /*in_turn=*/false, limit, plan);
  turns_ = 0;
}

void Policy::PlanPrompts(Priority priority, int64_t limit, Plan* plan) {
  const EntryList<SchedulerEntry>& prefilling = prefilling_[Index(priority)];
  for (SchedulerEntry* entry = prefilling.front(); entry != nullptr && plan->tokens < limit;
       entry = prefilling.After(entry)) {
    // One that was admitted for its age has its row.
    if (entry->planned_step != steps_ && !entry->held) AddPrefillRow(entry, limit, plan);
  }
  while (plan->tokens < limit && HasFreeSlot()) {
    SchedulerEntry* const next = line_.Next(priority);
    if (next == nullptr) break;
    Admit(next, /*in_turn=*/true, limit, plan);
  }
}

// Of the entries that are being fed; null when none is.
SchedulerEntry* Policy::OldestOfLowest() const {
  for (const EntryList<SchedulerEntry>& list : prefilling_) {
    SchedulerEntry* entry = list.front();
    while (entry != nullptr && entry->held) entry = list.After(entry);
    if (entry != nullptr) return entry;
  }
  return nullptr;
}

void Policy::PlanStep(absl::Time now, int64_t prompt_budget, Plan* plan) {
  plan->rows.clear();
  plan->admitted.clear();
  plan->resumed.clear();
  plan->preempted.clear();
  ++steps_;
  prompt_budget = std::max<int64_t>(prompt_budget, 1);
  PreemptForWaiting(std::min<int64_t>(prompt_budget, options_.step_token_budget -
                                                         static_cast<int64_t>(decoding())),
                    plan);
  for (const std::vector<SchedulerEntry*>& list : decoding_) {
    for (SchedulerEntry* entry : list) plan->rows.push_back({entry, 1});
  }
  plan->decode_rows = static_cast<int32_t>(plan->rows.size());
  plan->tokens = plan->decode_rows;
  const int64_t limit = std::min<int64_t>(options_.step_token_budget, plan->tokens + prompt_budget);
  AdmitAged(now, limit, plan);
  if (steps_ % kAgedStep == 0 && plan->tokens < limit) {
    SchedulerEntry* const lowest = OldestOfLowest();
    if (lowest != nullptr && lowest->planned_step != steps_) AddPrefillRow(lowest, limit, plan);
  }
  for (int rank = kNumPriorities - 1; rank >= 0; --rank) {
    PlanPrompts(static_cast<Priority>(rank), limit, plan);
  }
}

void Policy::CompleteStep(const Plan& plan) {
  for (int32_t i = 0; i < plan.decode_rows; ++i) line_.Charge(plan.rows[i].entry, 1);
  for (size_t i = plan.decode_rows; i < plan.rows.size(); ++i) {
    SchedulerEntry* const entry = plan.rows[i].entry;
    entry->fed += plan.rows[i].tokens;
    line_.Charge(entry, plan.rows[i].tokens);
    if (entry->fed < entry->prompt_tokens) continue;
    prefilling_[Index(entry->rank)].Erase(entry);
    StartDecoding(entry);
  }
}

void Policy::Pause(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->phase == Phase::kDecode, "only a decoding entry can pause");
  Unlist(entry);
  entry->phase = Phase::kPaused;
  Append(&paused_, entry);
}

void Policy::Resume(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->phase == Phase::kPaused || entry->phase == Phase::kParked,
                 "only a paused entry can resume");
  Unlist(entry);
  if (entry->phase == Phase::kPaused) {
    StartDecoding(entry);
  } else {
    entry->phase = Phase::kPreempted;
    line_.Prepend(entry);
  }
}

void Policy::Unhold(SchedulerEntry* entry) {
  entry->held = false;
  line_.Pledge(entry, entry->prompt_tokens - entry->fed);
}

}  // namespace mmfree
