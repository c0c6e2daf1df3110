// Several engines of one model as one: a GPU each, behind one front.
#ifndef MMFREE_SERVER_ENGINE_ENGINE_GROUP_H_
#define MMFREE_SERVER_ENGINE_ENGINE_GROUP_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "server/engine/engine.h"

namespace mmfree {

// Each request goes to the healthy member with the fewest requests for its slots, or to the one
// whose device has its state, if a slot is free there; when that one refuses it, to the next. It is
// refused when all do, with the first one's words. Which member runs a request makes no difference
// to its result. A member that becomes unhealthy gets no more requests; the group is healthy while
// one member is.
//
// INVALID_ARGUMENT: no members, or members of different models. One member comes back as it is.
absl::StatusOr<std::unique_ptr<Engine>> GroupEngines(std::vector<std::unique_ptr<Engine>> members);

}  // namespace mmfree

#endif  // MMFREE_SERVER_ENGINE_ENGINE_GROUP_H_
