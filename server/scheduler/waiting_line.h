// Who is admitted next: the order of the entries that wait for a slot.
#ifndef MMFREE_SERVER_SCHEDULER_WAITING_LINE_H_
#define MMFREE_SERVER_SCHEDULER_WAITING_LINE_H_

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

// Within a class of priority the caller comes first that has had the fewest tokens for its share:
// those processed, and those of prompts that have been admitted and are still to be fed. Within a
// caller, entries come in the order of their arrival. A caller that comes back after a pause starts
// at what the last admitted caller had: idleness earns nothing, and using up a share cannot be
// undone by leaving for a moment.
//
// Entries belong to their caller's account from Join to Leave and are in line from Append or
// Prepend to Withdraw. Every operation takes logarithmic time in the number of callers. Not
// thread-safe.
class WaitingLine {
 public:
  WaitingLine();
  ~WaitingLine();
  WaitingLine(const WaitingLine&) = delete;
  WaitingLine& operator=(const WaitingLine&) = delete;

  // Opens the entry's account with its caller; its share is that of the caller from now on.
  void Join(SchedulerEntry* entry);
  // Closes it; what was pledged and not charged is given back. Not while in line.
  void Leave(SchedulerEntry* entry);

  // Gets in line behind, or before, the others of its caller and class.
  void Append(SchedulerEntry* entry);
  void Prepend(SchedulerEntry* entry);
  void Withdraw(SchedulerEntry* entry);

  // Who is next in a class; null when nobody waits in it.
  SchedulerEntry* Next(Priority priority);
  // Who has been in the system for longest of all that wait; null when nobody does.
  SchedulerEntry* Oldest() const { return by_age_.empty() ? nullptr : *by_age_.begin(); }

  // The entry, just withdrawn, was admitted, in the turn of its caller or out of it, and `tokens`
  // of its prompt are to be fed that were not pledged before.
  void Admitted(SchedulerEntry* entry, int64_t tokens, bool in_turn);
  // Of an admitted entry's prompt, so many tokens are still to be fed, whatever was pledged before.
  void Pledge(SchedulerEntry* entry, int64_t tokens);
  // A step processed so many tokens of the entry; what was pledged is used up first.
  void Charge(SchedulerEntry* entry, int64_t tokens);

  size_t size() const { return by_age_.size(); }
  bool empty() const { return by_age_.empty(); }
  size_t size(Priority priority) const { return sizes_[static_cast<size_t>(priority)]; }
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

  void Enter(SchedulerEntry* entry, bool front);
  void PutInPlace(CallerAccount* account, size_t priority);
  void TakeFromPlace(CallerAccount* account, size_t priority);
  void ForgetIdle();

  absl::flat_hash_map<std::string, std::unique_ptr<CallerAccount>> accounts_;
  std::array<Places, kNumPriorities> places_;  // callers with an entry in line, by class
  std::array<size_t, kNumPriorities> sizes_{};
  absl::btree_set<SchedulerEntry*, OlderFirst> by_age_;
  absl::btree_set<Place> idle_;  // accounts without entries
  double virtual_time_ = 0;      // service of the last caller admitted in its turn; never falls
  uint64_t next_serial_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_WAITING_LINE_H_
