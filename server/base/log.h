// One line to the standard error stream: what an operator must know and no caller is told.
#ifndef MMFREE_SERVER_BASE_LOG_H_
#define MMFREE_SERVER_BASE_LOG_H_

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace mmfree {

enum class LogLevel : char { kInfo = 'I', kWarning = 'W', kError = 'E' };

// Thread-safe: lines do not mix.
inline void Log(LogLevel level, absl::string_view message) {
  const std::string line =
      absl::StrCat(absl::string_view(reinterpret_cast<const char*>(&level), 1), " ",
                   absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()), " ",
                   message, "\n");
  fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_LOG_H_
