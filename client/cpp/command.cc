#include "client/cpp/command.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/tokenizer/utf8.h"

namespace mmfree {

absl::Status ExpectNoArguments(const std::vector<std::string>& arguments) {
  if (arguments.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("unexpected argument \"", arguments.front(), "\""));
}

absl::Status CheckUtf8(absl::string_view what, absl::string_view text) {
  const size_t bad = FindInvalidUtf8(text);
  if (bad == text.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is not valid UTF-8 at byte ", bad,
                                                 "; convert it, for example with iconv"));
}

absl::StatusOr<std::string> ReadInput(const std::string& path) {
  const bool standard_input = path == "-";
  const auto cannot_read = [&path](int error) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", path, ": ", strerror(error)));
  };
  FILE* const file = standard_input ? stdin : fopen(path.c_str(), "rb");
  if (file == nullptr) return cannot_read(errno);
  const absl::Cleanup close = [file, standard_input] {
    if (!standard_input) fclose(file);
  };
  std::string content;
  char buffer[1 << 16];
  while (const size_t size = fread(buffer, 1, sizeof(buffer), file)) content.append(buffer, size);
  // A directory can be opened, but not read.
  if (ferror(file) != 0) return cannot_read(errno);
  MMFREE_RETURN_IF_ERROR(CheckUtf8(standard_input ? "the standard input" : path, content));
  return content;
}

void PrintLine(absl::string_view line) {
  const std::string text = absl::StrCat(line, "\n");
  fwrite(text.data(), 1, text.size(), stdout);
  fflush(stdout);
}

}  // namespace mmfree
