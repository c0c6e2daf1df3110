// Classes of service.
#ifndef MMFREE_SERVER_SCHEDULER_PRIORITY_H_
#define MMFREE_SERVER_SCHEDULER_PRIORITY_H_

#include <cstdint>

namespace mmfree {

enum class Priority : uint8_t { kLow, kNormal, kHigh };

inline constexpr int kNumPriorities = 3;

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_PRIORITY_H_
