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
    : options_(options),
      capacity_(Capacity(options)),
      prepare_(std::move(prepare)),
      order_(options.prefill_chunk) {
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
  entry->begun = false;
  order_.Join(entry);
  order_.Append(entry, Line::kWaiting);
  if (entry->deadline != absl::InfiniteFuture()) deadlines_.insert(entry);
}

void Policy::Unlist(SchedulerEntry* entry) {
  switch (entry->phase) {
    case Phase::kPrefill:
      EraseAt(&prefilling_[Index(entry->rank)], entry);
      if (entry == aged_) aged_ = nullptr;
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
  if (entry->phase != Phase::kWaiting && entry->phase != Phase::kPreempted) Unlist(entry);
  order_.Withdraw(entry);
  order_.Leave(entry);
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

// The entry that one in line can take a slot from; null when there is none. A paused one makes no
// use of its slot. Otherwise one of the lowest class, and one that streams before one that is still
// to answer. Otherwise the longest of the longer prompts of the same class: it would not be fed
// before this one anyway.
SchedulerEntry* Policy::FindVictim(const SchedulerEntry& taker, const Plan& plan) const {
  // In an aged step the tokens may have gone to a prompt of a lower class.
  if (steps_ % kAgedStep == 0 || plan.preempted.size() >= kMaxPreemptionsPerStep) return nullptr;
  if (!paused_.empty()) return paused_.back();
  for (size_t rank = 0; rank < Index(taker.priority); ++rank) {
    if (!decoding_[rank].empty()) return decoding_[rank].back();
    if (!prefilling_[rank].empty()) return prefilling_[rank].back();
  }
  SchedulerEntry* victim = nullptr;
  int longest = taker.size;
  for (SchedulerEntry* entry : prefilling_[Index(taker.priority)]) {
    if (entry->line != Line::kFeeding || entry->size <= longest || entry == aged_) continue;
    victim = entry;
    longest = entry->size;
  }
  return victim;
}

void Policy::Preempt(SchedulerEntry* victim, Plan* plan) {
  Unlist(victim);
  plan->preempted.push_back({victim, victim->slot});
  free_slots_.push_back(std::exchange(victim->slot, -1));
  if (victim->phase == Phase::kPaused) {
    victim->phase = Phase::kParked;
    Append(&parked_, victim);
    return;
  }
  if (victim->phase == Phase::kDecode) ++room_left_;
  order_.Withdraw(victim);
  victim->phase = Phase::kPreempted;
  order_.Prepend(victim, Line::kWaiting);
}

void Policy::StartDecoding(SchedulerEntry* entry) {
  entry->phase = Phase::kDecode;
  Append(&decoding_[Index(entry->rank)], entry);
}

// `tokens` of its prompt, or fewer when there is a boundary before.
int64_t Policy::CutAtBoundary(const SchedulerEntry& entry, int64_t tokens) {
  const int64_t to_boundary = entry.chunk_boundary - entry.fed;
  return to_boundary > 0 ? std::min(tokens, to_boundary) : tokens;
}

void Policy::AddPromptRow(SchedulerEntry* entry) {
  order_.Withdraw(entry);
  const int64_t tokens =
      CutAtBoundary(*entry, std::min<int64_t>({options_.prefill_chunk,
                                               entry->prompt_tokens - entry->fed, tokens_left()}));
  prompt_rows_.push_back({entry, static_cast<int32_t>(tokens)});
  prompt_left_ -= tokens;
  room_left_ -= tokens;
  order_.Charge(entry, tokens);
}

// Gives an entry in line a slot and its first row; a slot and tokens are left.
void Policy::Admit(SchedulerEntry* entry, Plan* plan) {
  ++turns_;
  order_.Withdraw(entry);
  const bool started = entry->phase == Phase::kPreempted;
  (started ? plan->resumed : plan->admitted).push_back(entry);
  entry->slot = free_slots_.back();
  free_slots_.pop_back();
  if (!entry->begun) {
    if (prepare_ != nullptr) prepare_(entry);
    ABSL_RAW_CHECK(entry->fed < entry->prompt_tokens, "a prompt without a token to feed");
    entry->begun = !entry->held;
  }
  if (entry->fed < entry->prompt_tokens) {
    entry->phase = Phase::kPrefill;
    Append(&prefilling_[Index(entry->rank)], entry);
    if (!entry->held) AddPromptRow(entry);
  } else {
    StartDecoding(entry);
    --prompt_left_;
    --room_left_;
  }
}

void Policy::AdmitAged(absl::Time now, Plan* plan) {
  SchedulerEntry* const oldest = order_.Oldest(Line::kWaiting);
  if (oldest == nullptr || aged_ != nullptr || turns_ + 1 < options_.aged_turn ||
      now - oldest->arrival < options_.age || !HasFreeSlot() || tokens_left() <= 0) {
    return;
  }
  oldest->rank = Priority::kHigh;
  Admit(oldest, plan);
  turns_ = 0;
  if (oldest->phase == Phase::kPrefill) aged_ = oldest;
}

void Policy::FeedOldest() {
  SchedulerEntry* const oldest = order_.Oldest(Line::kFeeding);
  if (oldest != nullptr && tokens_left() > 0) AddPromptRow(oldest);
}

void Policy::TakeTurns(Priority priority, Plan* plan) {
  while (tokens_left() > 0) {
    SchedulerEntry* entry = order_.Next(priority, /*slot_left=*/true);
    if (entry != nullptr && entry->line == Line::kWaiting && !HasFreeSlot()) {
      SchedulerEntry* const victim = FindVictim(*entry, *plan);
      if (victim != nullptr) {
        Preempt(victim, plan);
      } else {
        entry = order_.Next(priority, /*slot_left=*/false);
      }
    }
    if (entry == nullptr) break;
    order_.TookTurn(entry);
    if (entry->line == Line::kFeeding) {
      AddPromptRow(entry);
    } else {
      Admit(entry, plan);
    }
  }
}

// The boundary of a prompt may have been set after its row was added.
void Policy::WriteRows(Plan* plan) {
  for (const std::vector<SchedulerEntry*>& list : decoding_) {
    for (SchedulerEntry* entry : list) plan->rows.push_back({entry, 1});
  }
  plan->decode_rows = static_cast<int32_t>(plan->rows.size());
  plan->tokens = plan->decode_rows;
  for (Row& row : prompt_rows_) {
    const int32_t tokens = static_cast<int32_t>(CutAtBoundary(*row.entry, row.tokens));
    if (tokens < row.tokens) order_.Charge(row.entry, tokens - row.tokens);
    row.tokens = tokens;
    plan->rows.push_back(row);
    plan->tokens += row.tokens;
  }
}

void Policy::PlanStep(absl::Time now, int64_t prompt_budget, Plan* plan) {
  plan->rows.clear();
  plan->admitted.clear();
  plan->resumed.clear();
  plan->preempted.clear();
  prompt_rows_.clear();
  ++steps_;
  prompt_left_ = std::max<int64_t>(prompt_budget, 1);
  room_left_ = options_.step_token_budget - static_cast<int64_t>(decoding());
  if (steps_ % kAgedStep == 0) FeedOldest();
  AdmitAged(now, plan);
  for (int rank = kNumPriorities - 1; rank >= 0; --rank) {
    TakeTurns(static_cast<Priority>(rank), plan);
  }
  WriteRows(plan);
}

void Policy::CompleteStep(const Plan& plan) {
  for (int32_t i = 0; i < plan.decode_rows; ++i) order_.Charge(plan.rows[i].entry, 1);
  for (size_t i = plan.decode_rows; i < plan.rows.size(); ++i) {
    SchedulerEntry* const entry = plan.rows[i].entry;
    entry->fed += plan.rows[i].tokens;
    if (entry->fed < entry->prompt_tokens) continue;
    Unlist(entry);
    StartDecoding(entry);
  }
  // Who came first stays before the others.
  for (size_t i = plan.rows.size(); i-- > static_cast<size_t>(plan.decode_rows);) {
    SchedulerEntry* const entry = plan.rows[i].entry;
    if (entry->phase == Phase::kPrefill) order_.Prepend(entry, Line::kFeeding);
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
    order_.Prepend(entry, Line::kWaiting);
  }
}

void Policy::Unhold(SchedulerEntry* entry) {
  entry->held = false;
  entry->begun = true;
  order_.Append(entry, Line::kFeeding);
}

}  // namespace mmfree
