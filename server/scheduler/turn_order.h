// Whose turn it is: the order of the requests that want a slot, or tokens of the next step for
// their prompts.
#ifndef MMFREE_SERVER_SCHEDULER_TURN_ORDER_H_
#define MMFREE_SERVER_SCHEDULER_TURN_ORDER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "server/scheduler/entry.h"

namespace mmfree {

// Two lines: entries that wait for a slot, and entries that have one and wait for the next chunk of
// their prompt. Within a class of priority the caller comes first that has had the fewest tokens
// for its share. Of its entries, the one comes first with the least of its prompt to feed, by
// PromptSize; among equals one that has been begun, and then in order of arrival. A caller that
// comes back after a pause starts at what the last caller had whose turn it was: idleness earns
// nothing, and using up a share cannot be undone by leaving for a moment.
//
// Entries belong to their caller's account from Join to Leave, and are in one line or none from
// then on. Every operation takes logarithmic time in the number of callers and entries. Not
// thread-safe.
class TurnOrder {
 public:
  // `full_chunk`: tokens of one prompt in one step at most.
  explicit TurnOrder(int64_t full_chunk);
  ~TurnOrder();
  TurnOrder(const TurnOrder&) = delete;
  TurnOrder& operator=(const TurnOrder&) = delete;

  // Opens the entry's account with its caller; its share is that of the caller from now on.
  void Join(SchedulerEntry* entry);
  // Closes it. Not while in a line.
  void Leave(SchedulerEntry* entry);

  // Gets in line behind, or before, the others of its caller, class and size.
  void Append(SchedulerEntry* entry, Line line) { Enter(entry, line, /*front=*/false); }
  void Prepend(SchedulerEntry* entry, Line line) { Enter(entry, line, /*front=*/true); }
  // Leaves the line it is in, if any.
  void Withdraw(SchedulerEntry* entry);
  // What decides its size may have changed.
  void Refile(SchedulerEntry* entry);

  // Whose turn it is in a class; null for nobody. One that waits for a slot only when there is one.
  SchedulerEntry* Next(Priority priority, bool slot_left);
  // It took its turn.
  void TookTurn(const SchedulerEntry* entry);
  // Who has been in the system for longest of all in a line; null when it is empty.
  SchedulerEntry* Oldest(Line line) const;

  // A step processes so many tokens of the entry, or fewer than was said.
  void Charge(SchedulerEntry* entry, int64_t tokens);

  size_t size(Line line) const { return Of(line).by_age.size(); }
  // Accounts kept, of present and past callers: bounded whatever names callers give.
  size_t accounts() const { return accounts_.size(); }

 private:
  friend struct CallerAccount;

  struct Place {
    double service = 0;  // of the account when it was put here: it may have grown since
    uint64_t serial = 0;
    CallerAccount* account = nullptr;
    bool operator<(const Place& other) const {
      return std::tie(service, serial) < std::tie(other.service, other.serial);
    }
  };
  using Places = absl::btree_set<Place>;

  struct OlderFirst {
    bool operator()(const SchedulerEntry* a, const SchedulerEntry* b) const {
      return a->id < b->id;
    }
  };

  struct WholeLine {
    std::array<Places, kNumPriorities> places;  // callers with an entry in it, by class
    absl::btree_set<SchedulerEntry*, OlderFirst> by_age;
  };

  WholeLine& Of(Line line) { return lines_[static_cast<size_t>(line)]; }
  const WholeLine& Of(Line line) const { return lines_[static_cast<size_t>(line)]; }

  int SizeOf(const SchedulerEntry& entry) const;
  void Enter(SchedulerEntry* entry, Line line, bool front);
  void PutInPlace(CallerAccount* account, Line line, size_t priority);
  void TakeFromPlace(CallerAccount* account, Line line, size_t priority);
  CallerAccount* FirstCaller(Line line, size_t priority);
  void ForgetIdle();

  const int64_t full_chunk_;
  absl::flat_hash_map<std::string, std::unique_ptr<CallerAccount>> accounts_;
  std::array<WholeLine, kNumLines> lines_;
  absl::btree_set<Place> idle_;  // accounts without entries
  double virtual_time_ = 0;      // service of the last caller whose turn it was; never falls
  uint64_t next_serial_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_TURN_ORDER_H_
