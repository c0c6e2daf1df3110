// Early return on a failed absl::Status or absl::StatusOr.
#ifndef MMFREE_SERVER_BASE_STATUS_MACROS_H_
#define MMFREE_SERVER_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define MMFREE_STATUS_CONCAT_INNER_(a, b) a##b
#define MMFREE_STATUS_CONCAT_(a, b) MMFREE_STATUS_CONCAT_INNER_(a, b)

// Evaluates a Status expression and returns it from the enclosing function unless it is OK.
#define MMFREE_RETURN_IF_ERROR(expr)                                  \
  do {                                                                \
    if (absl::Status mmfree_status_ = (expr); !mmfree_status_.ok()) { \
      return mmfree_status_;                                          \
    }                                                                 \
  } while (false)

// MMFREE_ASSIGN_OR_RETURN(auto value, StatusOrExpression());
#define MMFREE_ASSIGN_OR_RETURN(lhs, expr) \
  MMFREE_ASSIGN_OR_RETURN_IMPL_(MMFREE_STATUS_CONCAT_(mmfree_statusor_, __LINE__), lhs, expr)
#define MMFREE_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = *std::move(statusor)

#endif  // MMFREE_SERVER_BASE_STATUS_MACROS_H_
