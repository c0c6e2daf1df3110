// What the stores say alike.
#ifndef MMFREE_SERVER_SESSIONS_STORE_ERRORS_H_
#define MMFREE_SERVER_SESSIONS_STORE_ERRORS_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/sessions/session.h"

namespace mmfree {

inline absl::Status NoSuchSession(const SessionName& name) {
  return absl::NotFoundError(absl::StrCat("there is no session \"", name.id, "\""));
}
inline absl::Status NoSuchCheckpoint(const SessionName& name) {
  return absl::NotFoundError(
      absl::StrCat("a checkpoint of session \"", name.id, "\" is not in the store"));
}
inline absl::Status SessionExists(const SessionName& name) {
  return absl::AlreadyExistsError(absl::StrCat("session \"", name.id, "\" exists"));
}
inline absl::Status SessionMovedOn(const SessionName& name) {
  return absl::AbortedError(
      absl::StrCat("session \"", name.id, "\" was changed by another turn meanwhile"));
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_SESSIONS_STORE_ERRORS_H_
