#include "server/scheduler/turn_order.h"

#include <algorithm>
#include <utility>

#include "absl/base/internal/raw_logging.h"
#include "server/scheduler/entry_list.h"
#include "server/scheduler/prompt_size.h"

namespace mmfree {
namespace {

// Accounts of absent callers that are still ahead of the others. A caller forgotten early starts
// level with them.
constexpr size_t kMaxIdleAccounts = 4096;

size_t Index(Priority priority) { return static_cast<size_t>(priority); }

// The entries of one caller and class in one line.
struct Queue {
  bool empty() const { return first_size() == kNumPromptSizes; }
  int first_size() const {
    int size = 0;
    while (size < kNumPromptSizes && by_size[size].empty()) ++size;
    return size;
  }
  SchedulerEntry* front() const { return by_size[first_size()].front(); }

  std::array<EntryList<SchedulerEntry>, kNumPromptSizes> by_size;
  double placed_at = 0;  // where the line's places have it, while not empty
};

}  // namespace

struct CallerAccount {
  Queue& queue(Line line, size_t priority) { return queues[static_cast<size_t>(line)][priority]; }

  std::string caller;
  uint64_t serial = 0;  // order of equals
  double share = 1;
  double service = 0;   // tokens for each unit of share
  int64_t entries = 0;  // joined
  std::array<std::array<Queue, kNumPriorities>, kNumLines> queues;
  double idle_at = 0;  // where idle_ has it, while without entries
};

TurnOrder::TurnOrder(int64_t full_chunk) : full_chunk_(full_chunk) {}
TurnOrder::~TurnOrder() = default;

void TurnOrder::Join(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->share >= 1, "a share is at least 1");
  std::unique_ptr<CallerAccount>& slot = accounts_[entry->caller];
  if (slot == nullptr) {
    slot = std::make_unique<CallerAccount>();
    slot->caller = entry->caller;
    slot->serial = next_serial_++;
    slot->service = virtual_time_;
  } else if (slot->entries == 0) {
    idle_.erase(Place{slot->idle_at, slot->serial, slot.get()});
    slot->service = std::max(slot->service, virtual_time_);
  }
  slot->share = entry->share;
  ++slot->entries;
  entry->account = slot.get();
}

void TurnOrder::Leave(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->line == Line::kNone, "it is in a line");
  CallerAccount* const account = std::exchange(entry->account, nullptr);
  if (--account->entries > 0) return;
  account->idle_at = account->service;
  idle_.insert(Place{account->idle_at, account->serial, account});
  ForgetIdle();
}

void TurnOrder::ForgetIdle() {
  while (!idle_.empty() &&
         (idle_.size() > kMaxIdleAccounts || idle_.begin()->service <= virtual_time_)) {
    const CallerAccount* const account = idle_.begin()->account;
    idle_.erase(idle_.begin());
    accounts_.erase(accounts_.find(account->caller));
  }
}

int TurnOrder::SizeOf(const SchedulerEntry& entry) const {
  const int64_t from = entry.begun ? entry.fed : std::max(entry.fed, entry.cached);
  const int64_t to = entry.awaited > from ? entry.awaited : entry.prompt_tokens;
  return PromptSize(to - from, full_chunk_);
}

void TurnOrder::Enter(SchedulerEntry* entry, Line line, bool front) {
  CallerAccount* const account = entry->account;
  const size_t priority = Index(entry->priority);
  Queue& queue = account->queue(line, priority);
  const bool first = queue.empty();
  entry->line = line;
  entry->size = SizeOf(*entry);
  if (front) {
    queue.by_size[entry->size].PushFront(entry);
  } else {
    queue.by_size[entry->size].PushBack(entry);
  }
  if (first) PutInPlace(account, line, priority);
  Of(line).by_age.insert(entry);
}

void TurnOrder::Withdraw(SchedulerEntry* entry) {
  const Line line = std::exchange(entry->line, Line::kNone);
  if (line == Line::kNone) return;
  CallerAccount* const account = entry->account;
  const size_t priority = Index(entry->priority);
  account->queue(line, priority).by_size[entry->size].Erase(entry);
  if (account->queue(line, priority).empty()) TakeFromPlace(account, line, priority);
  Of(line).by_age.erase(entry);
}

void TurnOrder::Refile(SchedulerEntry* entry) {
  const Line line = entry->line;
  if (line == Line::kNone || SizeOf(*entry) == entry->size) return;
  Withdraw(entry);
  Prepend(entry, line);
}

void TurnOrder::PutInPlace(CallerAccount* account, Line line, size_t priority) {
  Queue& queue = account->queue(line, priority);
  queue.placed_at = account->service;
  Of(line).places[priority].insert(Place{queue.placed_at, account->serial, account});
}

void TurnOrder::TakeFromPlace(CallerAccount* account, Line line, size_t priority) {
  const double service = account->queue(line, priority).placed_at;
  Of(line).places[priority].erase(Place{service, account->serial, account});
}

CallerAccount* TurnOrder::FirstCaller(Line line, size_t priority) {
  Places& places = Of(line).places[priority];
  while (!places.empty()) {
    CallerAccount* const account = places.begin()->account;
    if (account->service <= places.begin()->service) return account;
    TakeFromPlace(account, line, priority);
    PutInPlace(account, line, priority);
  }
  return nullptr;
}

SchedulerEntry* TurnOrder::Next(Priority priority, bool slot_left) {
  const size_t index = Index(priority);
  CallerAccount* const feeding = FirstCaller(Line::kFeeding, index);
  CallerAccount* const waiting = slot_left ? FirstCaller(Line::kWaiting, index) : nullptr;
  if (feeding == nullptr && waiting == nullptr) return nullptr;
  const auto front_of = [index](CallerAccount* account, Line line) {
    return account->queue(line, index).front();
  };
  if (waiting == nullptr) return front_of(feeding, Line::kFeeding);
  if (feeding == nullptr) return front_of(waiting, Line::kWaiting);
  const bool begun_first = feeding == waiting
                               ? feeding->queue(Line::kFeeding, index).first_size() <=
                                     waiting->queue(Line::kWaiting, index).first_size()
                               : feeding->service <= waiting->service;
  return begun_first ? front_of(feeding, Line::kFeeding) : front_of(waiting, Line::kWaiting);
}

void TurnOrder::TookTurn(const SchedulerEntry* entry) {
  virtual_time_ = std::max(virtual_time_, entry->account->service);
}

SchedulerEntry* TurnOrder::Oldest(Line line) const {
  return Of(line).by_age.empty() ? nullptr : *Of(line).by_age.begin();
}

void TurnOrder::Charge(SchedulerEntry* entry, int64_t tokens) {
  CallerAccount* const account = entry->account;
  account->service += static_cast<double>(tokens) / account->share;
  if (tokens >= 0) return;
  // The places are right only for accounts that grow.
  for (const Line line : {Line::kWaiting, Line::kFeeding}) {
    for (size_t i = 0; i < kNumPriorities; ++i) {
      if (account->queue(line, i).empty()) continue;
      TakeFromPlace(account, line, i);
      PutInPlace(account, line, i);
    }
  }
}

}  // namespace mmfree
