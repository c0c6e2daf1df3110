// What a load run measured.
#ifndef MMFREE_CLIENT_LOAD_REPORT_H_
#define MMFREE_CLIENT_LOAD_REPORT_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/time/time.h"
#include "client/load/histogram.h"

namespace mmfree {

// Not thread-safe.
struct Report {
  absl::Duration elapsed;
  int64_t started = 0;
  int64_t finished = 0;         // with OK
  int64_t cancelled = 0;        // by the generator, as planned
  int64_t tokens = 0;           // received, of all requests
  int64_t finished_tokens = 0;  // received by requests that finished: goodput
  int64_t prompt_tokens = 0;    // of requests that finished
  int64_t cached_tokens = 0;    // of these, those that were not computed again
  int64_t most_concurrent = 0;
  std::map<std::string, int64_t> errors;  // other ends, by gRPC code
  Histogram first_token;                  // from the start of the call to the first token
  Histogram
      inter_token;       // between tokens; those of one message share the time since the one before
  Histogram end_to_end;  // of finished requests
  absl::Duration longest_silence;  // between two messages of one stream that was read at once

  int64_t failed() const {
    int64_t count = 0;
    for (const auto& [code, errors_of_code] : errors) count += errors_of_code;
    return count;
  }
};

// For people: several lines.
std::string ToText(const Report& report);
// One compact object; times in seconds.
std::string ToJson(const Report& report);

}  // namespace mmfree

#endif  // MMFREE_CLIENT_LOAD_REPORT_H_
