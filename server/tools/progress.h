// Progress of long work for people: a bar on a terminal, a line every tenth otherwise.
#ifndef MMFREE_SERVER_TOOLS_PROGRESS_H_
#define MMFREE_SERVER_TOOLS_PROGRESS_H_

#include <cstdint>
#include <ostream>
#include <string>

#include "absl/strings/string_view.h"

namespace mmfree {

// Not thread-safe.
class Progress {
 public:
  // `out` must outlive this. `label` says what is done, e.g. "packing".
  Progress(std::ostream* out, bool terminal, absl::string_view label)
      : out_(*out), terminal_(terminal), label_(label) {}

  // Prints when the shown figure changes: whole percents on a terminal, tens otherwise. The bar's
  // line ends at done == total.
  void Update(int64_t done, int64_t total);

 private:
  std::ostream& out_;
  const bool terminal_;
  const std::string label_;
  int64_t shown_percent_ = -1;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOOLS_PROGRESS_H_
