#include "server/scheduler/waiting_line.h"

#include <algorithm>
#include <utility>

#include "absl/base/internal/raw_logging.h"
#include "server/scheduler/entry_list.h"

namespace mmfree {
namespace {

// Accounts of absent callers that are still ahead of the others. A caller forgotten early starts
// level with them.
constexpr size_t kMaxIdleAccounts = 4096;

size_t Index(Priority priority) { return static_cast<size_t>(priority); }

}  // namespace

struct CallerAccount {
  // Tokens for each unit of share, pledged ones included.
  double service() const { return charged + static_cast<double>(pledged) / share; }

  std::string caller;
  uint64_t serial = 0;  // order of equals
  double share = 1;
  double charged = 0;   // tokens for each unit of share
  int64_t pledged = 0;  // tokens of admitted prompts
  int64_t entries = 0;  // joined
  std::array<EntryList<SchedulerEntry>, kNumPriorities> waiting;
  std::array<double, kNumPriorities> placed_at{};  // where places_ has it, while waiting
  double idle_at = 0;                              // where idle_ has it, while without entries
};

WaitingLine::WaitingLine() = default;
WaitingLine::~WaitingLine() = default;

void WaitingLine::Join(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->share >= 1, "a share is at least 1");
  std::unique_ptr<CallerAccount>& slot = accounts_[entry->caller];
  if (slot == nullptr) {
    slot = std::make_unique<CallerAccount>();
    slot->caller = entry->caller;
    slot->serial = next_serial_++;
    slot->charged = virtual_time_;
  } else if (slot->entries == 0) {
    idle_.erase(Place{slot->idle_at, slot->serial, slot.get()});
    slot->charged = std::max(slot->charged, virtual_time_);
  }
  slot->share = entry->share;
  ++slot->entries;
  entry->account = slot.get();
  entry->pledged = 0;
}

void WaitingLine::Leave(SchedulerEntry* entry) {
  Pledge(entry, 0);
  CallerAccount* const account = std::exchange(entry->account, nullptr);
  if (--account->entries > 0) return;
  account->idle_at = account->charged;
  idle_.insert(Place{account->idle_at, account->serial, account});
  ForgetIdle();
}

void WaitingLine::Pledge(SchedulerEntry* entry, int64_t tokens) {
  CallerAccount* const account = entry->account;
  const int64_t change = tokens - std::exchange(entry->pledged, tokens);
  account->pledged += change;
  if (change >= 0) return;
  // The places are right only for accounts that grow.
  for (size_t i = 0; i < kNumPriorities; ++i) {
    if (account->waiting[i].empty()) continue;
    TakeFromPlace(account, i);
    PutInPlace(account, i);
  }
}

void WaitingLine::ForgetIdle() {
  while (!idle_.empty() &&
         (idle_.size() > kMaxIdleAccounts || idle_.begin()->service <= virtual_time_)) {
    const CallerAccount* const account = idle_.begin()->account;
    idle_.erase(idle_.begin());
    accounts_.erase(accounts_.find(account->caller));
  }
}

void WaitingLine::Append(SchedulerEntry* entry) { Enter(entry, /*front=*/false); }
void WaitingLine::Prepend(SchedulerEntry* entry) { Enter(entry, /*front=*/true); }

void WaitingLine::Enter(SchedulerEntry* entry, bool front) {
  CallerAccount* const account = entry->account;
  const size_t priority = Index(entry->priority);
  EntryList<SchedulerEntry>& waiting = account->waiting[priority];
  const bool first = waiting.empty();
  if (front) {
    waiting.PushFront(entry);
  } else {
    waiting.PushBack(entry);
  }
  if (first) PutInPlace(account, priority);
  by_age_.insert(entry);
  ++sizes_[priority];
}

void WaitingLine::Withdraw(SchedulerEntry* entry) {
  CallerAccount* const account = entry->account;
  const size_t priority = Index(entry->priority);
  account->waiting[priority].Erase(entry);
  if (account->waiting[priority].empty()) TakeFromPlace(account, priority);
  by_age_.erase(entry);
  --sizes_[priority];
}

void WaitingLine::PutInPlace(CallerAccount* account, size_t priority) {
  account->placed_at[priority] = account->service();
  places_[priority].insert(Place{account->placed_at[priority], account->serial, account});
}

void WaitingLine::TakeFromPlace(CallerAccount* account, size_t priority) {
  places_[priority].erase(Place{account->placed_at[priority], account->serial, account});
}

SchedulerEntry* WaitingLine::Next(Priority priority) {
  Places& places = places_[Index(priority)];
  while (!places.empty()) {
    CallerAccount* const account = places.begin()->account;
    if (account->service() <= places.begin()->service) {
      return account->waiting[Index(priority)].front();
    }
    TakeFromPlace(account, Index(priority));
    PutInPlace(account, Index(priority));
  }
  return nullptr;
}

void WaitingLine::Admitted(SchedulerEntry* entry, int64_t tokens, bool in_turn) {
  CallerAccount* const account = entry->account;
  if (in_turn) virtual_time_ = std::max(virtual_time_, account->service());
  entry->pledged += tokens;
  account->pledged += tokens;
}

void WaitingLine::Charge(SchedulerEntry* entry, int64_t tokens) {
  CallerAccount* const account = entry->account;
  account->charged += static_cast<double>(tokens) / account->share;
  const int64_t pledged = std::min(tokens, entry->pledged);
  entry->pledged -= pledged;
  account->pledged -= pledged;
}

}  // namespace mmfree
