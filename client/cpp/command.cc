#include "client/cpp/command.h"

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace mmfree {

absl::Status ExpectNoArguments(const std::vector<std::string>& arguments) {
  if (arguments.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("unexpected argument \"", arguments.front(), "\""));
}

absl::StatusOr<std::string> ReadInput(const std::string& path) {
  std::ifstream file;
  if (path != "-") {
    file.open(path, std::ios::binary);
    if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  }
  std::istream& in = path == "-" ? std::cin : file;
  std::string content{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (in.bad()) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  return content;
}

void PrintLine(absl::string_view line) {
  const std::string text = absl::StrCat(line, "\n");
  fwrite(text.data(), 1, text.size(), stdout);
  fflush(stdout);
}

}  // namespace mmfree
