// One request as the scheduler's decisions see it.
#ifndef MMFREE_SERVER_SCHEDULER_ENTRY_H_
#define MMFREE_SERVER_SCHEDULER_ENTRY_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "server/scheduler/entry_list.h"
#include "server/scheduler/priority.h"

namespace mmfree {

struct CallerAccount;

enum class Phase : uint8_t {
  kNone,       // the policy does not hold it
  kWaiting,    // for a slot
  kPrefill,    // holds a slot; part of its prompt is still to be fed
  kDecode,     // holds a slot; one token a step
  kPaused,     // holds a slot; skips steps because its reader lags
  kPreempted,  // waits for a slot again; its owner has its state
  kParked,     // paused, and its slot was given to another; its owner has its state
};

// What TurnOrder lines up.
enum class Line : uint8_t {
  kWaiting,  // for a slot
  kFeeding,  // for the next chunk of its prompt
  kNone,
};
inline constexpr size_t kNumLines = 2;

// The owner keeps it at one address from Enqueue to Remove; the first fields are the owner's and
// constant in between, the last the policy's.
struct SchedulerEntry : EntryListNode {
  uint64_t id = 0;            // distinct, growing in the order of arrival
  int64_t prompt_tokens = 0;  // to be fed before the first token is sampled; at least one
  absl::Time deadline = absl::InfiniteFuture();
  Priority priority = Priority::kNormal;
  std::string caller;  // whose share of the service it counts against
  int32_t share = 1;   // of that caller, in proportion to the others'; at least 1
  int64_t cached = 0;  // tokens of the prompt that probably need not be fed: only for its turn

  // Set by the owner until the entry's first step is planned (Policy::Prepare is the last chance),
  // advanced by the policy: tokens of the prompt that are in the state. Less than prompt_tokens.
  int64_t fed = 0;
  // The owner's to set at any time between steps: while it is above `fed`, a chunk does not go
  // beyond it, so that the state after exactly this many tokens of the prompt can be read.
  int64_t chunk_boundary = 0;
  // The owner's, set like that and told to Policy::Refile: while it is above `fed`, others wait for
  // the state after so many tokens of the prompt, and its turn is that of one that ends there.
  int64_t awaited = 0;
  // Set by the owner in Policy::Prepare: keeps its slot and skips steps until Policy::Unhold.
  bool held = false;

  Phase phase = Phase::kNone;
  Priority rank = Priority::kNormal;  // its priority, or above it once its age has counted
  int32_t slot = -1;                  // while it holds one
  size_t index = 0;                   // in the policy's list of entries in its phase
  absl::Time arrival;                 // when it was enqueued
  bool begun = false;                 // it has been prepared, so `fed` is right
  CallerAccount* account = nullptr;
  Line line = Line::kNone;
  int size = 0;  // PromptSize of what is left, while in a line
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_ENTRY_H_
