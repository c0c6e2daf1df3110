#include "server/tools/progress.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace mmfree {

void Progress::Update(int64_t done, int64_t total) {
  const double fraction = total <= 0 ? 1.0 : static_cast<double>(done) / static_cast<double>(total);
  int64_t percent = std::clamp<int64_t>(static_cast<int64_t>(fraction * 100.0), 0, 100);
  if (!terminal_) percent = percent / 10 * 10;
  if (percent <= shown_percent_) return;
  shown_percent_ = percent;
  const std::string sizes = absl::StrFormat("%.1f of %.1f MB", static_cast<double>(done) / 1e6,
                                            static_cast<double>(total) / 1e6);
  if (!terminal_) {
    out_ << absl::StrFormat("%s: %3d %%  (%s)\n", label_, percent, sizes) << std::flush;
    return;
  }
  constexpr int64_t kWidth = 40;
  const std::string bar(static_cast<size_t>(percent * kWidth / 100), '#');
  out_ << absl::StrFormat("\r%s [%-40s] %3d %%  %s", label_, bar, percent, sizes)
       << (percent == 100 ? "\n" : "") << std::flush;
}

}  // namespace mmfree
